//! A guest process: its machine, its memory, and what Linux would know of it; and the loop in which
//! it runs.

use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;

use carlsbad_types::ByteSize;
use kvm_bindings::kvm_regs;

use crate::backend::Status;

use super::calls::signal::Delivery;
use super::calls::table::{HostFile, Open};
use super::calls::{Call, Execute, Kernel, Outcome};
use super::clock;
use super::cpu;
use super::elf::{self, LoadPlan};
use super::interrupt;
use super::layout::{Layout, SYSTEM_START, system};
use super::machine::{Host, Machine, Refusal, Stop};
use super::memory::GuestMemory;
use super::page_table;
use super::shim::{self, Return};
use super::stack::{self, Beginning};
use super::window::Windows;

/// A program, and where it goes.
#[derive(Debug, Clone)]
pub struct Image {
    /// How it is loaded.
    pub plan: LoadPlan,
    /// Where everything is.
    pub layout: Layout,
}

impl Image {
    /// Plans the program `bytes` in a guest with `memory`.
    ///
    /// # Errors
    /// Why it cannot be loaded.
    pub fn new(bytes: &[u8], memory: ByteSize) -> Result<Self, String> {
        let plan = elf::plan(bytes)?;
        let layout = Layout::new(&plan, memory)?;
        Ok(Self { plan, layout })
    }

    /// Writes program and tables into new memory; gives the root of the tables too.
    ///
    /// # Errors
    /// Where there is no room.
    pub fn load(&self, bytes: &[u8], way_back: Return) -> Result<(GuestMemory, u64), String> {
        let mut memory =
            GuestMemory::new(&self.layout).map_err(|why| format!("no memory: {why}"))?;
        let root = page_table::write(&mut memory, &self.layout)?;
        cpu::write_tables(&mut memory);
        memory.write_offset(system::CODE, &shim::code(way_back));
        for segment in &self.plan.segments {
            let Some(region) = self
                .layout
                .regions
                .iter()
                .find(|r| r.address <= segment.address && segment.address < r.end())
            else {
                continue;
            };
            let from = segment.file_offset as usize;
            let part = bytes
                .get(from..from + segment.file_len as usize)
                .ok_or("the program ends early")?;
            memory.write_offset(region.offset + (segment.address - region.address), part);
        }
        Ok((memory, root))
    }
}

/// A guest process.
#[derive(Debug)]
pub struct Guest {
    // In this order: the machine goes before its memory.
    pub machine: Machine,
    pub memory: GuestMemory,
    pub kernel: Kernel,
    pub image: Image,
    pub root: u64,
    pub host: Rc<Host>,
    pub way_back: Return,
    pub windows: Windows,
    /// Calls that left the machine.
    pub exits: u64,
    /// Whether memory and program are still those of the template.
    pub is_template: bool,
    /// Whether this is a process that the guest made by `fork`.
    pub is_child: bool,
}

/// Why a guest does not run any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// It has ended.
    Status(Status),
    /// The template is to be saved.
    Snapshot,
    /// The machine is of no use any more.
    Broken(String),
}

impl Guest {
    /// Runs it to its end.
    pub fn run(&mut self) -> End {
        interrupt::watch(self.machine.immediate_exit());
        let end = self.run_watched();
        interrupt::forget();
        self.collect();
        end
    }

    fn run_watched(&mut self) -> End {
        loop {
            let end = match self.machine.run() {
                Stop::Call => self.serve(),
                Stop::Exception(vector) => self.fault(vector),
                Stop::Interrupted if interrupt::is_over() => Some(End::Status(Status::TimedOut)),
                Stop::Interrupted => self.interrupted(),
                Stop::Broken(why) => Some(End::Broken(why)),
            };
            if let Some(end) = end {
                return end;
            }
        }
    }

    /// Takes what the shim has kept.
    fn collect(&mut self) {
        if self.way_back == Return::Jump {
            self.windows.take_output(&self.memory, &mut self.kernel);
            self.windows.settle(&self.memory);
        }
    }

    /// Serves the call for which the machine was left.
    fn serve(&mut self) -> Option<End> {
        self.exits += 1;
        self.collect();
        let regs = *self.machine.regs();
        let call = Call {
            number: regs.rax,
            args: [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9],
        };
        self.windows.before(&call);
        let outcome = loop {
            match self.kernel.call(&self.memory, call) {
                Outcome::Interrupted if interrupt::is_over() => {
                    return Some(End::Status(Status::TimedOut));
                }
                Outcome::Interrupted => {
                    self.kernel.signals.raise_all(interrupt::take());
                    if self.kernel.signals.interrupts() {
                        break Outcome::Interrupted;
                    }
                    self.kernel.signals.drop_ignored();
                }
                other => break other,
            }
        };
        let value = match outcome {
            Outcome::Value(value) => value,
            Outcome::End(status) => return Some(End::Status(status)),
            Outcome::Snapshot => return Some(End::Snapshot),
            Outcome::SignalReturn => {
                let mut regs = regs;
                if self.kernel.signals.leave(&self.memory, &mut regs).is_err() {
                    return Some(End::Status(Status::Signal(libc::SIGSEGV)));
                }
                return self.go_on(regs, false);
            }
            Outcome::Execute(execute) => {
                return match self.execute(&execute) {
                    Ok(()) => None,
                    // The old program is gone, as on Linux past the point of no return.
                    Err(why) => {
                        tracing::debug!(why, "execve");
                        Some(End::Status(Status::Signal(libc::SIGKILL)))
                    }
                };
            }
            Outcome::Fork {
                stack,
                child_id_at,
                parent_id_at,
            } => match self.fork(stack, child_id_at) {
                Ok(0) => 0,
                Ok(child) => {
                    if parent_id_at != 0 {
                        let _not_the_guests = self
                            .memory
                            .write(parent_id_at, &(child as i32).to_le_bytes());
                    }
                    child
                }
                Err(why) => return Some(End::Broken(why)),
            },
            Outcome::Interrupted => -i64::from(libc::EINTR),
        };
        self.machine.regs().rax = value as u64;
        if self.way_back == Return::Jump {
            self.windows
                .after(&call, value, &self.memory, &mut self.kernel);
        }
        self.kernel.signals.raise_all(interrupt::take());
        if self.kernel.signals.any() {
            let mut regs = *self.machine.regs();
            // The call has returned.
            (regs.rip, regs.rflags) = (regs.rcx, regs.r11);
            return self.deliver(regs, false);
        }
        None
    }

    /// Signals came while the guest ran.
    fn interrupted(&mut self) -> Option<End> {
        self.kernel.signals.raise_all(interrupt::take());
        let regs = *self.machine.regs();
        if !self.kernel.signals.any() {
            return None;
        }
        if shim::is_inside(regs.rip) {
            // A call is being answered: the signal is delivered when the next one returns.
            return None;
        }
        self.deliver(regs, false)
    }

    /// Delivers a signal to a guest that would go on with `regs`.
    fn deliver(&mut self, regs: kvm_regs, from_ring0: bool) -> Option<End> {
        let mut regs = regs;
        match self.kernel.signals.deliver(&self.memory, &mut regs) {
            Some(Delivery::Fatal(signal)) => Some(End::Status(Status::Signal(signal))),
            Some(Delivery::Handled) => self.go_on(regs, from_ring0),
            None => None,
        }
    }

    /// Lets the guest go on with `regs`, at its own privilege.
    fn go_on(&mut self, regs: kvm_regs, from_ring0: bool) -> Option<End> {
        if (from_ring0 || self.way_back == Return::Sysret)
            && let Err(why) = self.machine.to_user_mode()
        {
            return Some(End::Broken(why.to_string()));
        }
        *self.machine.regs() = regs;
        None
    }

    /// The guest raised an exception: its own fault, or the shim's on its behalf.
    fn fault(&mut self, vector: u8) -> Option<End> {
        /// Exceptions that push an error code (Intel SDM, volume 3A, 6.3.1).
        const WITH_CODE: [u8; 9] = [8, 10, 11, 12, 13, 14, 17, 21, 29];
        let mut regs = *self.machine.regs();
        let code = if WITH_CODE.contains(&vector) { 8 } else { 0 };
        let frame = regs.rsp.wrapping_sub(SYSTEM_START).wrapping_add(code);
        let mut bytes = [0; 40];
        self.memory.read_offset(frame, &mut bytes);
        let word = |i: usize| {
            let bytes = bytes.get(i * 8..i * 8 + 8).and_then(|b| b.try_into().ok());
            u64::from_le_bytes(bytes.unwrap_or_default())
        };
        let (rip, flags, rsp) = (word(0), word(2), word(3));
        regs.rsp = rsp;
        if shim::is_inside(rip) && self.way_back == Return::Jump {
            // What the guest gave a handler was not its own: the call is served here instead, and
            // answers EFAULT.
            let saved = |i: u64| self.memory.data(shim::data::SAVED + i * 8);
            (regs.rcx, regs.rdi, regs.rsi) = (saved(0), saved(1), saved(2));
            (regs.rdx, regs.rax) = (saved(3), saved(4));
            regs.rip = shim::exit_address() + 2;
            regs.rflags = flags & 0xcd5 | 2;
            if let Some(end) = self.go_on(regs, true) {
                return Some(end);
            }
            return self.serve();
        }
        let signal = match vector {
            0 | 16 | 19 => libc::SIGFPE,
            1 | 3 => libc::SIGTRAP,
            6 => libc::SIGILL,
            17 => libc::SIGBUS,
            _ => libc::SIGSEGV,
        };
        (regs.rip, regs.rflags) = (rip, flags);
        self.kernel.signals.raise(signal);
        match self.kernel.signals.deliver(&self.memory, &mut regs) {
            Some(Delivery::Handled) => self.go_on(regs, true),
            // One that is ignored or blocked ends it all the same, as on Linux.
            Some(Delivery::Fatal(_)) | None => Some(End::Status(Status::Signal(signal))),
        }
    }

    /// Becomes another program.
    fn execute(&mut self, execute: &Execute) -> Result<(), String> {
        let size = ByteSize::new(self.image.layout.memory);
        let program = execute.program.bytes().map_err(|why| why.to_string())?;
        let image = Image::new(&program, size)?;
        let (memory, root) = image.load(&program, self.way_back)?;
        let entry = shim::entry(self.way_back);
        interrupt::forget();
        let machine = Machine::new(&self.host, &memory, root, entry).map_err(|r| r.to_string())?;
        self.windows.forget();
        // The machine goes before the memory that it has.
        self.machine = machine;
        self.memory = memory;
        self.root = root;
        self.image = image;
        self.is_template = false;
        self.kernel.become_program(execute);
        self.kernel.space = super::calls::space::Space::new(&self.image.layout);
        self.begin(&execute.args, &execute.env, &execute.path)
            .map_err(|why| why.to_string())?;
        interrupt::watch(self.machine.immediate_exit());
        Ok(())
    }

    /// Sets the machine to the program's first instruction.
    ///
    /// # Errors
    /// Where arguments and environment are too long.
    pub fn begin(&mut self, args: &[Vec<u8>], env: &[Vec<u8>], path: &[u8]) -> Result<(), Refusal> {
        let mut random = [0; 16];
        fill_random(&mut random);
        let beginning = Beginning {
            args,
            env,
            path,
            random,
            ids: (self.kernel.identity.uid, self.kernel.identity.gid),
            hwcap: u64::from(self.host.features()),
        };
        let top = self.image.layout.stack.end();
        let (pointer, _) = stack::write(&self.memory, &self.image.plan, top, &beginning).map_err(
            |super::memory::Fault| Refusal {
                what: "hold so many arguments",
                why: nix::errno::Errno::E2BIG,
            },
        )?;
        self.kernel.space.publish(&self.memory);
        self.publish();
        *self.machine.regs() = kvm_regs {
            rip: self.image.plan.entry,
            rsp: pointer,
            rflags: 2,
            ..Default::default()
        };
        Ok(())
    }

    /// Tells the shim who the guest is, what time it is, and what it may keep.
    pub fn publish(&mut self) {
        let ids = &self.kernel.identity;
        let values = [
            u64::from(ids.pid.unsigned_abs()),
            u64::from(ids.ppid.unsigned_abs()),
            u64::from(ids.uid),
            u64::from(ids.gid),
        ];
        for (i, value) in (0..).zip(values) {
            self.memory.set_data(shim::data::IDS + i * 8, value);
        }
        self.memory.set_data(shim::data::SERVED, 0);
        if self.way_back == Return::Jump {
            clock::publish(&self.memory, self.host.tsc_khz(&self.machine));
            self.windows.publish(&self.memory, &self.kernel);
        }
    }

    /// Calls that were served inside the machine.
    pub fn served(&self) -> u64 {
        self.memory.data(shim::data::SERVED)
    }

    /// Makes a second process of the guest. Gives 0 in the new one.
    fn fork(&mut self, stack: u64, child_id_at: u64) -> Result<i64, String> {
        self.kernel.outputs.flush();
        self.kernel.relatives = true;
        self.windows.forget();
        self.windows.withdraw(&self.memory);
        share_input(&mut self.kernel).map_err(|why| format!("standard input: {why}"))?;
        let mut saved = self.machine.save().map_err(|why| why.to_string())?;
        let parent = nix::unistd::getpid();
        // SAFETY: this process has one thread, so that the new one can do whatever it likes.
        match unsafe { nix::unistd::fork() } {
            Err(why) => Ok(-i64::from(why as i32)),
            Ok(nix::unistd::ForkResult::Parent { child }) => {
                self.kernel.children.push(child.as_raw());
                Ok(i64::from(child.as_raw()))
            }
            Ok(nix::unistd::ForkResult::Child) => {
                die_with(parent);
                self.is_child = true;
                self.is_template = false;
                self.kernel.children.clear();
                self.kernel.signals.forget_pending();
                let identity = &mut self.kernel.identity;
                (identity.ppid, identity.pid) = (identity.pid, nix::unistd::getpid().as_raw());
                // The machine is the parent's, whose memory it has. The call is answered, not made
                // again.
                saved.regs.rip = shim::exit_address() + 2;
                let entry = shim::entry(self.way_back);
                self.machine = Machine::new(&self.host, &self.memory, self.root, entry)
                    .map_err(|why| why.to_string())?;
                self.machine
                    .restore(&saved)
                    .map_err(|why| why.to_string())?;
                interrupt::watch(self.machine.immediate_exit());
                if stack != 0 {
                    self.machine.regs().rsp = stack;
                }
                let id = self.kernel.identity.pid.to_le_bytes();
                if child_id_at != 0 {
                    let _not_the_guests = self.memory.write(child_id_at, &id);
                }
                self.publish();
                Ok(0)
            }
        }
    }
}

/// Ends this process when `parent` does.
pub fn die_with(parent: nix::unistd::Pid) {
    let _always = nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL);
    if nix::unistd::getppid() != parent {
        std::process::exit(0);
    }
}

/// Entropy of the host's.
pub fn fill_random(into: &mut [u8]) {
    // SAFETY: a buffer with its length.
    let _short_never = unsafe { libc::getrandom(into.as_mut_ptr().cast(), into.len(), 0) };
}

/// Standard input that was given as bytes becomes a file, so that two processes read on where the
/// other has stopped.
fn share_input(kernel: &mut Kernel) -> nix::Result<()> {
    for (_, open) in kernel.table.iter() {
        let mut open = open.borrow_mut();
        if let Open::Bytes { bytes, at } = &*open {
            let rest = Arc::<[u8]>::from(bytes.get(*at..).unwrap_or_default());
            let name = c"stdin";
            let fd = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
            let mut done = 0;
            while done < rest.len() {
                done += nix::unistd::write(&fd, &rest[done..])?;
            }
            // SAFETY: a descriptor of ours.
            nix::errno::Errno::result(unsafe { libc::lseek(fd.as_raw_fd(), 0, libc::SEEK_SET) })?;
            *open = Open::Host(HostFile::pipe(fd));
        }
    }
    Ok(())
}
