//! Who a guest process is, its children, and the programs it becomes.

use nix::errno::Errno;

use super::super::elf;
use super::super::layout::STACK;
use super::super::memory::GuestMemory;
use super::super::stack::MOST_ARGUMENTS;
use super::layers::MOST_PATH;
use super::path::file_name;
use super::{Answer, Execute, Kernel, Outcome, bytes_of};

/// What is different in every clone.
#[derive(Debug, Clone, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
pub struct Identity {
    /// Process id.
    pub pid: i32,
    /// Parent's id.
    pub ppid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Name of the machine.
    pub host_name: String,
    /// A number of its own, drawn for this clone.
    pub unique: [u8; 16],
    /// Its arguments, each with a zero behind it.
    pub arguments: Vec<u8>,
}

impl Identity {
    /// The number as `/proc/sys/kernel/random/boot_id` shows one (a version 4 UUID).
    pub fn boot_id(&self) -> String {
        let mut bytes = self.unique;
        bytes[6] = bytes[6] & 0x0f | 0x40;
        bytes[8] = bytes[8] & 0x3f | 0x80;
        let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let part = |from: usize, to: usize| hex.get(from..to).unwrap_or_default().to_owned();
        [
            part(0, 8),
            part(8, 12),
            part(12, 16),
            part(16, 20),
            part(20, 32),
        ]
        .join("-")
    }
}

/// What `uname` says of the kernel: of this layer, not of the host.
const RELEASE: &str = "6.1.0-rund";

/// `getrandom`: the host's, for each call anew.
pub fn entropy(memory: &GuestMemory, into: u64, len: u64) -> Answer {
    /// The most of one call, so that it ends.
    const MOST: u64 = 1 << 20;
    let len = len.min(MOST);
    let place = memory.user(into, len, true)?;
    let mut done = 0;
    while done < len as usize {
        // SAFETY: `user` has checked `len` bytes.
        let rest = unsafe { place.add(done) };
        // SAFETY: `rest` has what is left of them.
        let n = unsafe { libc::getrandom(rest.as_ptr().cast(), len as usize - done, 0) };
        done += Errno::result(n)? as usize;
    }
    Ok(len as i64)
}

/// `getrusage`: what was used is not told.
pub fn getrusage(memory: &GuestMemory, _who: u64, into: u64) -> Answer {
    memory.write(into, &[0; size_of::<libc::rusage>()])?;
    Ok(0)
}

/// `sched_getaffinity`: one processor.
pub fn affinity(memory: &GuestMemory, len: u64, into: u64) -> Answer {
    if len < 8 || !len.is_multiple_of(8) {
        return Err(Errno::EINVAL);
    }
    memory.write(into, &1u64.to_le_bytes())?;
    Ok(8)
}

/// `futex`: there is no other thread that could wake or be woken.
pub fn futex(memory: &GuestMemory, at: u64, operation: u64, value: u64) -> Answer {
    match operation as i32 & !(libc::FUTEX_PRIVATE_FLAG | libc::FUTEX_CLOCK_REALTIME) {
        libc::FUTEX_WAKE => Ok(0),
        libc::FUTEX_WAIT | libc::FUTEX_WAIT_BITSET => {
            let mut word = [0; 4];
            memory.read(at, &mut word)?;
            if u32::from_le_bytes(word) == value as u32 {
                return Err(Errno::EDEADLK);
            }
            Err(Errno::EAGAIN)
        }
        _ => Err(Errno::ENOSYS),
    }
}

impl Kernel {
    /// `uname`
    pub fn uname(&self, memory: &GuestMemory, into: u64) -> Answer {
        /// Length of each of its fields.
        const FIELD: usize = 65;
        let mut answer = [0u8; 6 * FIELD];
        let fields = [
            "Linux",
            &self.identity.host_name,
            RELEASE,
            "#1 SMP rund",
            "x86_64",
            "(none)",
        ];
        for (field, place) in fields.iter().zip(answer.chunks_mut(FIELD)) {
            let len = field.len().min(FIELD - 1);
            place[..len].copy_from_slice(&field.as_bytes()[..len]);
        }
        memory.write(into, &answer)?;
        Ok(0)
    }

    /// `sysinfo`
    pub fn sysinfo(&self, memory: &GuestMemory, into: u64) -> Answer {
        // SAFETY: all zeros is a valid value of this plain structure.
        let mut info: libc::sysinfo = unsafe { std::mem::zeroed() };
        info.uptime = super::time::now(libc::CLOCK_MONOTONIC as u64).tv_sec;
        info.totalram = memory.len();
        info.freeram = memory.len() / 2;
        info.procs = 1;
        info.mem_unit = 1;
        memory.write(into, bytes_of(&info))?;
        Ok(0)
    }

    /// `prlimit64`: of the process itself, and nothing is changed.
    pub fn prlimit(&self, memory: &GuestMemory, pid: u64, what: u64, new: u64, old: u64) -> Answer {
        if pid != 0 && pid != self.identity.pid as u64 {
            return Err(Errno::EPERM);
        }
        if what >= 16 {
            return Err(Errno::EINVAL);
        }
        if new != 0 {
            // A limit that is asked for is at least a string of two numbers that can be read.
            memory.read_u64(new)?;
            memory.read_u64(new.wrapping_add(8))?;
        }
        if old != 0 {
            let limit = match what as u32 {
                libc::RLIMIT_STACK => STACK,
                libc::RLIMIT_NOFILE => super::table::MOST_DESCRIPTORS as u64,
                libc::RLIMIT_CORE => 0,
                _ => u64::MAX,
            };
            let pair = [limit.to_le_bytes(), limit.to_le_bytes()].concat();
            memory.write(old, &pair)?;
        }
        Ok(0)
    }

    /// `prctl`: the name only.
    pub fn prctl(&mut self, memory: &GuestMemory, what: u64, argument: u64) -> Answer {
        match i32::try_from(what).unwrap_or(-1) {
            libc::PR_SET_NAME => {
                let name = memory
                    .read_string(argument, 4096)
                    .map_err(|_| Errno::EFAULT)?;
                self.set_name(&name);
                Ok(0)
            }
            libc::PR_GET_NAME => {
                memory.write(argument, &self.name)?;
                Ok(0)
            }
            libc::PR_SET_PDEATHSIG | libc::PR_SET_DUMPABLE | libc::PR_SET_NO_NEW_PRIVS => Ok(0),
            libc::PR_GET_DUMPABLE | libc::PR_GET_NO_NEW_PRIVS => Ok(1),
            _ => Err(Errno::EINVAL),
        }
    }

    /// Sets the process' name, of which 15 bytes count.
    pub fn set_name(&mut self, name: &[u8]) {
        self.name = [0; 16];
        let len = name.len().min(15);
        self.name[..len].copy_from_slice(&name[..len]);
    }

    /// `clone`, where it means fork.
    pub fn clone_process(&mut self, args: [u64; 6]) -> Result<Outcome, Errno> {
        let [flags, stack, parent_id, child_id, ..] = args;
        let flags = flags as i32;
        let known = libc::CLONE_CHILD_CLEARTID
            | libc::CLONE_CHILD_SETTID
            | libc::CLONE_PARENT_SETTID
            | libc::CLONE_VFORK
            | libc::CLONE_VM;
        let signal = flags & 0xff;
        // Shared memory is only had while the parent waits for the child to be another program.
        let threads = flags & libc::CLONE_VM != 0 && flags & libc::CLONE_VFORK == 0;
        if flags & !known & !0xff != 0 || signal != libc::SIGCHLD || threads {
            return Err(Errno::ENOSYS);
        }
        let asked = |flag: i32, at: u64| if flags & flag != 0 { at } else { 0 };
        self.fork(
            stack,
            asked(libc::CLONE_CHILD_SETTID, child_id),
            asked(libc::CLONE_PARENT_SETTID, parent_id),
        )
    }

    /// `fork` and `vfork`
    pub fn fork(
        &mut self,
        stack: u64,
        child_id_at: u64,
        parent_id_at: u64,
    ) -> Result<Outcome, Errno> {
        Ok(Outcome::Fork {
            stack,
            child_id_at,
            parent_id_at,
        })
    }

    /// `wait4`
    pub fn wait(&mut self, memory: &GuestMemory, pid: u64, status_at: u64, options: u64) -> Answer {
        let (pid, options) = (pid as i32, options as i32);
        if options & !(libc::WNOHANG | libc::WUNTRACED | libc::WCONTINUED) != 0 {
            return Err(Errno::EINVAL);
        }
        let Some(ended) = self.children.wait(pid, options & libc::WNOHANG != 0)? else {
            return Ok(0);
        };
        if ended.signal {
            self.signals.raise(libc::SIGCHLD);
        }
        if status_at != 0 {
            memory.write(status_at, &ended.status.to_le_bytes())?;
        }
        Ok(i64::from(ended.pid))
    }

    /// `kill`, of the process itself and of its children.
    pub fn kill(&mut self, pid: u64, signal: u64) -> Answer {
        let signal = i32::try_from(signal).map_err(|_| Errno::EINVAL)?;
        if !(0..=64).contains(&signal) {
            return Err(Errno::EINVAL);
        }
        let pid = pid as i32;
        if [self.identity.pid, 0].contains(&pid) {
            self.signals.raise(signal);
            return Ok(0);
        }
        if !self.children.contains(pid) {
            return Err(Errno::ESRCH);
        }
        // Its monitor takes it for the guest that it runs.
        // SAFETY: a child of ours that was not waited for: its number is nobody else's.
        let killed = unsafe { libc::kill(pid, signal) };
        Errno::result(killed).map(i64::from)
    }

    /// `execve`
    pub fn execve(
        &mut self,
        memory: &GuestMemory,
        path: u64,
        args: u64,
        env: u64,
    ) -> Result<Outcome, Errno> {
        let path = memory
            .read_string(path, MOST_PATH)
            .map_err(|why| why.map_or(Errno::EFAULT, |()| Errno::ENAMETOOLONG))?;
        if path.is_empty() {
            return Err(Errno::ENOENT);
        }
        let mut room = MOST_ARGUMENTS;
        let mut args = strings(memory, args, &mut room)?;
        let env = strings(memory, env, &mut room)?;
        let mut path = self.absolute(&path);
        let (mut program, _) = self.program_at(&path)?;
        if let Some((interpreter, argument)) = script(&program.head(SCRIPT_LINE)?) {
            let rest = args.split_off(args.len().min(1));
            let shown = path;
            path = self.absolute(&interpreter);
            (program, _) = self.program_at(&path)?;
            args = vec![interpreter];
            args.extend(argument);
            args.push(shown);
            args.extend(rest);
        }
        // Before anything is undone: a program that cannot be loaded leaves the old one running.
        let plan = elf::plan(&program.head(elf::HEAD)?, program.len).map_err(|why| {
            tracing::debug!(why, "execve");
            Errno::ENOEXEC
        })?;
        Ok(Outcome::Execute(Box::new(Execute {
            program,
            plan,
            path,
            args,
            env,
        })))
    }

    /// Becomes another program: what `execve` changes of what Linux knows.
    pub fn become_program(&mut self, execute: &Execute) {
        self.table.close_on_exec();
        self.signals.forget_handlers();
        self.program = execute.program.clone();
        self.program_path.clone_from(&execute.path);
        self.identity.arguments = joined(&execute.args);
        let name = file_name(&execute.path).to_vec();
        self.set_name(&name);
    }

    /// `rt_sigsuspend`
    pub fn suspend(&mut self, memory: &GuestMemory, mask: u64) -> Answer {
        let mask = memory.read_u64(mask)?;
        self.signals.suspend(mask);
        self.wait_for_signal()
    }

    /// Waits until there is a signal that does something: EINTR then.
    pub fn wait_for_signal(&mut self) -> Answer {
        /// A signal that comes just before is seen this much later.
        const LOOK: libc::c_int = 5;
        if !self.signals.interrupts() {
            // SAFETY: no descriptors.
            unsafe { libc::poll(std::ptr::null_mut(), 0, LOOK) };
        }
        Err(Errno::EINTR)
    }
}

/// Arguments with a zero behind each, as `/proc/self/cmdline` has them.
pub fn joined(args: &[Vec<u8>]) -> Vec<u8> {
    args.iter()
        .flat_map(|arg| arg.iter().copied().chain([0]))
        .collect()
}

/// The strings that an array of pointers points to; takes from `room`.
fn strings(memory: &GuestMemory, mut at: u64, room: &mut usize) -> Result<Vec<Vec<u8>>, Errno> {
    let mut all = Vec::new();
    if at == 0 {
        return Ok(all);
    }
    loop {
        let pointer = memory.read_u64(at)?;
        if pointer == 0 {
            return Ok(all);
        }
        let string = memory
            .read_string(pointer, *room)
            .map_err(|why| why.map_or(Errno::EFAULT, |()| Errno::E2BIG))?;
        *room = room.checked_sub(string.len() + 9).ok_or(Errno::E2BIG)?;
        all.push(string);
        at = at.wrapping_add(8);
    }
}

/// The part of a script in which its first line has to end (Linux: `BINPRM_BUF_SIZE`).
const SCRIPT_LINE: u64 = 256;

/// Interpreter and argument of a script.
fn script(program: &[u8]) -> Option<(Vec<u8>, Option<Vec<u8>>)> {
    let line = program.strip_prefix(b"#!")?;
    let line = line.split(|byte| *byte == b'\n').next()?;
    let line = line.trim_ascii();
    let mut words = line.splitn(2, u8::is_ascii_whitespace);
    let interpreter = words.next()?.to_vec();
    let argument = words.next().map(|rest| rest.trim_ascii().to_vec());
    (!interpreter.is_empty()).then_some((interpreter, argument.filter(|it| !it.is_empty())))
}
