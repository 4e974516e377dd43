//! The helper: this program started again, as the first process of the sandbox's PID namespace. It
//! builds the sandbox around itself, gives up its rights, starts the program, and then does what
//! an init does: reaps, keeps the time, collects output, and says how the program ended.
//!
//! It has one thread, so that it may fork.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use rustix::fs::{CWD, Mode, OFlags, mkdirat};
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_bind,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::thread::UnshareFlags;

use super::confine;
use super::plan::{
    BEGIN, CAPTURED, CONTINUE, DONE, END, ENDED, PLAN, PROGRAM, Plan, READY, ROOT, Root, STATUS,
    STOP,
};

/// A directory that every Linux has, on which the new root lies for a moment.
const STEP: &str = "/proc";
/// Devices that need no right and keep no state.
const DEVICES: [&str; 5] = ["null", "zero", "full", "random", "urandom"];
/// Of output that is waiting, so much at a time.
const CHUNK: usize = 1 << 16;

type Result<T> = std::result::Result<T, String>;

/// For `map_err`: what was tried.
fn tried<E: std::fmt::Display>(what: &str) -> impl FnOnce(E) -> String {
    move |why| format!("cannot {what}: {why}")
}

/// Runs the helper to its end.
pub(super) fn main() -> ! {
    let code = match run() {
        Ok(()) => 0,
        Err(why) => {
            // SAFETY: the descriptor was passed to us under this number, and nobody else here
            // closes it.
            let mut ready = unsafe { File::from_raw_fd(READY) };
            let _nobody_listens = ready.write_all(why.as_bytes());
            1
        }
    };
    std::process::exit(code)
}

fn run() -> Result<()> {
    // SAFETY: closes what we were not given; nothing here has opened anything yet.
    unsafe { libc::close_range(END as u32, u32::MAX, 0) };
    SigSet::all()
        .thread_block()
        .map_err(tried("block signals"))?;
    let mut word = [0];
    match nix::unistd::read(borrowed(STATUS), &mut word) {
        Ok(1) if word == [BEGIN] => {}
        _ => return Err("the owner is gone".to_owned()),
    }
    let mut bytes = Vec::new();
    owned(PLAN)
        .read_to_end(&mut bytes)
        .map_err(tried("read the plan"))?;
    let plan: Plan = postcard::from_bytes(&bytes).map_err(tried("read the plan"))?;
    if let Some((uid, gid)) = plan.user {
        become_root_of_a_user_namespace(uid, gid)?;
    }
    enter_root(&plan)?;
    rustix::system::sethostname(plan.hostname.as_bytes()).map_err(tried("set the host name"))?;
    confine::drop_capabilities().map_err(tried("give up capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(tried("forbid new privileges"))?;
    // The sandbox has our user id: it must not read or trace us.
    nix::sys::prctl::set_dumpable(false).map_err(tried("become untraceable"))?;
    supervise(&plan)
}

/// The descriptor that we were given under this number, to be closed by us.
fn owned(number: RawFd) -> File {
    // SAFETY: the numbers of the plan are descriptors that were made for us; each is taken once.
    unsafe { File::from_raw_fd(number) }
}

fn borrowed(number: RawFd) -> BorrowedFd<'static> {
    // SAFETY: open as long as the helper lives: whoever takes it by `owned` ends with it.
    unsafe { BorrowedFd::borrow_raw(number) }
}

/// Without rights on the host: all of them in a user namespace, and the other namespaces in it.
/// What returns is the first process of the PID namespace; its parent waits for it.
fn become_root_of_a_user_namespace(uid: u32, gid: u32) -> Result<()> {
    let all = UnshareFlags::NEWUSER
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: descriptors are not unshared.
    unsafe { rustix::thread::unshare_unsafe(all) }.map_err(tried("make namespaces"))?;
    let write = |file: &str, text: String| {
        std::fs::write(Path::new("/proc/self").join(file), text).map_err(tried("map the user"))
    };
    write("setgroups", "deny".to_owned())?;
    write("uid_map", format!("0 {uid} 1"))?;
    write("gid_map", format!("0 {gid} 1"))?;
    // SAFETY: this process has one thread.
    match unsafe { fork() }.map_err(tried("start the first process"))? {
        ForkResult::Child => {
            nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).map_err(tried("die with the parent"))
        }
        ForkResult::Parent { child } => {
            for number in PLAN + 1..END {
                drop(owned(number));
            }
            let _its_end_is_said_by_itself = waitpid(child, None);
            std::process::exit(0)
        }
    }
}

/// Makes the plan's root `/`, with `/proc`, `/dev` and `/tmp` where it has or takes them.
fn enter_root(plan: &Plan) -> Result<()> {
    let failed = tried::<rustix::io::Errno>;
    // Ours alone from here on: nothing that is mounted below is seen outside.
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(failed("make mounts private"))?;
    let given = owned(ROOT);
    match plan.root {
        Root::Empty => {
            let options = c"size=1m,mode=0755";
            rustix::mount::mount("rund-rt", STEP, "tmpfs", MountFlags::NODEV, options)
                .map_err(failed("mount an empty root"))?;
        }
        Root::ReadOnly | Root::Writable => place_root(&given)?,
    }
    let root = rustix::fs::open(STEP, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
        .map_err(failed("open the root"))?;
    for name in ["proc", "dev", "tmp"] {
        if plan.root == Root::ReadOnly {
            break;
        }
        let _read_only_or_there = mkdirat(&root, name, Mode::from_raw_mode(0o755));
    }
    let below = |name: &str| Path::new(STEP).join(name);
    if below("dev").is_dir() {
        let options = c"size=64k,mode=0755";
        let flags = MountFlags::NOSUID | MountFlags::NOEXEC;
        rustix::mount::mount("rund-rt", below("dev"), "tmpfs", flags, options)
            .map_err(failed("mount /dev"))?;
        for name in DEVICES {
            let target = below("dev").join(name);
            File::create(&target).map_err(tried("make a device"))?;
            mount_bind(Path::new("/dev").join(name), &target).map_err(failed("bind a device"))?;
        }
    }
    // Mounted where the old one is still visible: a user namespace may not mount one otherwise.
    if below("proc").is_dir() {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("proc", below("proc"), "proc", flags, None)
            .map_err(failed("mount /proc"))?;
        // The kernel's settings lie there, and root may write to them even without capabilities.
        mount_remount(
            below("proc"),
            MountFlags::BIND | MountFlags::RDONLY | flags,
            c"",
        )
        .map_err(failed("make /proc read-only"))?;
    }
    if plan.root == Root::ReadOnly {
        let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        mount_remount(STEP, flags, c"").map_err(failed("make the root read-only"))?;
    }
    rustix::process::fchdir(&root).map_err(failed("enter the root"))?;
    rustix::process::pivot_root(".", ".").map_err(failed("change the root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(failed("leave the old root"))?;
    rustix::process::chdir("/").map_err(failed("enter the root"))
}

/// Mounts the directory that we were given, or the detached mount, at [`STEP`].
fn place_root(given: &File) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    // A detached mount is moved; any other directory is bound, by its path, since its descriptor
    // belongs to the mounts of our parent.
    if move_mount(given, "", CWD, STEP, flags).is_ok() {
        return Ok(());
    }
    let path = std::fs::read_link(format!("/proc/self/fd/{}", given.as_raw_fd()))
        .map_err(tried("find the root"))?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(CWD, &path, flags).map_err(tried("clone the root's mount"))?;
    // The path may lead elsewhere by now, or never have led there: a detached mount has none.
    let id = |fd: BorrowedFd<'_>| {
        let stat = rustix::fs::fstat(fd).map_err(tried("stat the root"));
        stat.map(|stat| (stat.st_dev, stat.st_ino))
    };
    if id(given.as_fd())? != id(tree.as_fd())? {
        return Err(format!("the root is not at {} any more", path.display()));
    }
    move_mount(
        &tree,
        "",
        CWD,
        STEP,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(tried("mount the root"))?;
    Ok(())
}

/// Starts the program and sees it through.
fn supervise(plan: &Plan) -> Result<()> {
    let pipes = plan
        .capture
        .map(|wanted| wanted.then(nix::unistd::pipe).transpose());
    let [out, err] = pipes.map(|pipe| pipe.map_err(tried("make a pipe")));
    let (out, err) = (out?, err?);
    let writers = [&out, &err].map(|pipe| pipe.as_ref().map(|(_, writer)| writer));
    let start = Instant::now();
    // SAFETY: this process has one thread.
    let program = match unsafe { fork() }.map_err(tried("start the program"))? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            let Err(why) = execute(plan, writers);
            return Err(why);
        }
    };
    // Only the program holds them from here on.
    drop(owned(READY));
    drop(owned(PROGRAM));
    for number in 0..3 {
        drop(owned(number));
    }
    let streams = [out, err].map(|pipe| pipe.map(|(reader, _writer)| File::from(reader)));
    let mut init = Init {
        streams,
        left: [plan.output_bytes; 2],
        truncated: false,
    };
    let deadline = plan.run_time_ms.map(|ms| start + Duration::from_millis(ms));
    let (raw, timed_out) = init.until_the_end_of(program, deadline)?;
    let end = super::plan::End {
        raw,
        timed_out,
        truncated: init.truncated,
    };
    let mut packet = vec![ENDED];
    packet.extend(postcard::to_allocvec(&end).map_err(tried("say how it ended"))?);
    // Where nobody listens, nobody wants to know.
    let _gone = nix::unistd::write(borrowed(STATUS), &packet);
    Ok(())
}

struct Init {
    /// What comes from standard output and error, where it is captured.
    streams: [Option<File>; 2],
    /// How much of it is still wanted.
    left: [u64; 2],
    truncated: bool,
}

impl Init {
    /// Waits for the program; how `wait` says it ended, and whether we ended it.
    fn until_the_end_of(&mut self, program: Pid, deadline: Option<Instant>) -> Result<(i32, bool)> {
        let mut wanted = SigSet::empty();
        wanted.add(Signal::SIGCHLD);
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&wanted, flags).map_err(tried("watch signals"))?;
        let mut timed_out = false;
        loop {
            if let Some(raw) = reap(program) {
                for stream in 0..2 {
                    self.drain(stream);
                }
                return Ok((raw, timed_out));
            }
            let left = deadline.filter(|_| !timed_out).map(|then| {
                // Rounded up, so that it is over when poll returns.
                let left =
                    then.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            });
            if deadline.is_some_and(|then| !timed_out && then <= Instant::now()) {
                timed_out = true;
                let _gone = kill(Pid::from_raw(-1), Signal::SIGKILL);
                continue;
            }
            self.wait(&signals, left.unwrap_or(PollTimeout::NONE))?;
        }
    }

    fn wait(&mut self, signals: &SignalFd, timeout: PollTimeout) -> Result<()> {
        let mut watched = vec![
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(borrowed(STATUS), PollFlags::POLLIN),
        ];
        let streams: Vec<_> = (0..2)
            .filter(|stream| self.streams[*stream].is_some())
            .collect();
        for stream in self.streams.iter().flatten() {
            watched.push(PollFd::new(stream.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut watched, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(why) => return Err(tried("wait")(why)),
        }
        let has = |at: usize| {
            let events = watched.get(at).and_then(PollFd::revents);
            events.is_some_and(|events| !events.is_empty())
        };
        if has(1) {
            obey();
        }
        let ready: Vec<_> = streams
            .iter()
            .enumerate()
            .filter(|(at, _)| has(at + 2))
            .map(|(_, stream)| *stream)
            .collect();
        while let Ok(Some(_)) = signals.read_signal() {}
        for stream in ready {
            self.take(stream);
        }
        Ok(())
    }

    /// Takes what is there of a stream; whether it may have more.
    fn take(&mut self, stream: usize) -> bool {
        let Some(file) = &mut self.streams[stream] else {
            return false;
        };
        let mut chunk = [0; CHUNK];
        match file.read(&mut chunk) {
            Ok(0) => {
                self.streams[stream] = None;
                false
            }
            Ok(n) => {
                let keep = n.min(usize::try_from(self.left[stream]).unwrap_or(usize::MAX));
                self.truncated |= keep < n;
                self.left[stream] -= keep as u64;
                if let Err(_full) = nix::unistd::write(borrowed(CAPTURED[stream]), &chunk[..keep]) {
                    self.truncated = true;
                }
                true
            }
            Err(why) => why.kind() == io::ErrorKind::Interrupted,
        }
    }

    /// Takes what is left in a stream when the program has ended, and waits for nobody who still
    /// holds it open.
    fn drain(&mut self, stream: usize) {
        if let Some(file) = &self.streams[stream]
            && rustix::io::ioctl_fionbio(file, true).is_err()
        {
            return;
        }
        while self.take(stream) {}
    }
}

/// Does what the owner says. Where the owner is gone, ends, and with it everything in this
/// namespace.
fn obey() {
    let mut command = [0];
    let all = Pid::from_raw(-1);
    let _nobody_there = match nix::unistd::read(borrowed(STATUS), &mut command) {
        Ok(1) if command == [STOP] => kill(all, Signal::SIGSTOP),
        Ok(1) if command == [CONTINUE] => kill(all, Signal::SIGCONT),
        Ok(1) | Err(nix::errno::Errno::EINTR) => Ok(()),
        _ => std::process::exit(1),
    };
    let _gone = nix::unistd::write(borrowed(STATUS), &[DONE]);
}

/// Reaps whoever has ended; the program's status if it is among them.
fn reap(program: Pid) -> Option<i32> {
    let mut ended = None;
    loop {
        let mut raw = 0;
        // SAFETY: `raw` is an int that waitpid writes.
        let pid = unsafe { libc::waitpid(-1, &raw mut raw, WaitPidFlag::WNOHANG.bits()) };
        if pid <= 0 {
            return ended;
        }
        if pid == program.as_raw() {
            ended = Some(raw);
        }
    }
}

/// Becomes the program. Returns only what went wrong.
fn execute(plan: &Plan, writers: [Option<&OwnedFd>; 2]) -> Result<Infallible> {
    for (number, writer) in [1, 2].into_iter().zip(writers) {
        let Some(writer) = writer else { continue };
        // SAFETY: two numbers; what was under the second is closed, as it should be.
        if unsafe { libc::dup2(writer.as_raw_fd(), number) } < 0 {
            return Err(tried("set up output")(io::Error::last_os_error()));
        }
    }
    // Whatever else is open closes with the exec; these were made to be inherited by us only.
    // SAFETY: marks descriptors, closes none.
    unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) };
    let text = |bytes: &Vec<u8>| CString::new(bytes.clone()).map_err(tried("pass a zero byte"));
    let list = |all: &[Vec<u8>]| all.iter().map(text).collect::<Result<Vec<_>>>();
    let (args, env) = (list(&plan.args)?, list(&plan.env)?);
    let pointers = |all: &[CString]| {
        let each = all.iter().map(|one| one.as_ptr());
        each.chain([std::ptr::null()]).collect::<Vec<_>>()
    };
    let (arg_pointers, env_pointers) = (pointers(&args), pointers(&env));
    let cwd = text(&plan.cwd)?;
    rustix::process::chdir(cwd.as_c_str())
        .map_err(tried(&format!("enter {}", cwd.to_string_lossy())))?;
    nix::unistd::setsid().map_err(tried("begin a session"))?;
    confine::landlock(borrowed(PROGRAM))?;
    let filter = confine::seccomp()?;
    // SAFETY: SIGPIPE's default action is what a program expects.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    SigSet::all()
        .thread_unblock()
        .map_err(tried("unblock signals"))?;
    seccompiler::apply_filter(&filter).map_err(tried("filter system calls"))?;
    // SAFETY: the lists end with null, and live until the call; the path is the empty string.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            PROGRAM,
            c"".as_ptr(),
            arg_pointers.as_ptr(),
            env_pointers.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    Err(tried("execute the program")(io::Error::last_os_error()))
}
