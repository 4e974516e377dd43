//! The zygote: this program, started again, with one thread and no rights. It makes a template and
//! starts the virtual machine monitors that clone it, by fork.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::rc::Rc;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork, getpid};

use super::builder;
use super::channel::Channel;
use super::confine::confine;
use super::fork::die_with;
use super::machine::Host;
use super::monitor::{self, Template};
use super::shim::Return;
use super::template::{Pages, State};
use super::upper::Secret;
use super::wire::{Failure, FromZygote, ToZygote};

/// What a zygote works with.
#[derive(Debug)]
pub struct Surroundings {
    /// KVM.
    pub host: Rc<Host>,
    /// How the entry code returns here.
    pub way_back: Return,
    /// The read-only layer.
    pub lower: Option<OwnedFd>,
    /// Where writable layers are made.
    pub upper: Option<OwnedFd>,
    /// What the names of layers there are made from.
    pub secret: Secret,
    /// The file of which each sandbox locks a byte.
    pub locks: &'static OwnedFd,
}

/// Runs a zygote on the channel that is standard input, until the owner is gone.
pub fn run() -> i32 {
    let _only_a_name = nix::sys::prctl::set_name(c"rund-zygote");
    // SAFETY: descriptor 0 is the channel that the owner gave, and nobody else uses it here.
    let mut owner = Channel::new(unsafe { OwnedFd::from_raw_fd(0) });
    // What the owner had open without meaning to pass it on. Standard error stays.
    // SAFETY: nothing in this process has a descriptor above 2 yet.
    let _old_kernel = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    match begin(&mut owner) {
        Ok(surroundings) => serve(&mut owner, surroundings),
        Err(failure) => {
            let _gone = owner.send(&FromZygote::Failed(failure), &[]);
            1
        }
    }
}

fn begin(owner: &mut Channel) -> Result<Surroundings, Failure> {
    let other = |why: String| Failure::Other(why);
    let (message, fds) = owner.receive(None).map_err(|why| other(why.to_string()))?;
    let ToZygote::Begin {
        lower,
        upper,
        secret,
    } = message
    else {
        return Err(other("an unexpected first message".into()));
    };
    let mut fds = fds.into_iter();
    let lower = if lower { fds.next() } else { None };
    let upper = if upper { fds.next() } else { None };
    let locks = memfd_create(c"rund-locks", MFdFlags::MFD_CLOEXEC)
        .map_err(|why| other(format!("locks: {why}")))?;
    let host = Host::open().map_err(|why| Failure::Kvm(why.to_string()))?;
    // SAFETY: a mask; guests have their own, which is applied to what they make.
    unsafe { libc::umask(0) };
    let mut confinement = confine(
        lower.as_ref().map(AsFd::as_fd),
        upper.as_ref().map(AsFd::as_fd),
    )
    .map_err(other)?;
    let way_back = builder::probe(&host).map_err(Failure::Kvm)?;
    confinement.ring0_entry = way_back == Return::Sysret;
    owner
        .send(&FromZygote::Ready(confinement), &[])
        .map_err(|why| other(why.to_string()))?;
    Ok(Surroundings {
        host: Rc::new(host),
        way_back,
        lower,
        upper,
        secret,
        // For as long as there is a zygote, and in its monitors.
        locks: Box::leak(Box::new(locks)),
    })
}

fn serve(owner: &mut Channel, surroundings: Surroundings) -> i32 {
    let surroundings = Rc::new(surroundings);
    let mut template: Option<Rc<Template>> = None;
    loop {
        reap();
        let Ok((message, fds)) = owner.receive(None) else {
            // The monitors end with this process.
            return 0;
        };
        let mut fds = fds.into_iter();
        let answer = match message {
            ToZygote::Begin { .. } => failed("an unexpected message"),
            ToZygote::Build(build) => match (fds.next(), fds.next()) {
                (Some(program), Some(file)) => {
                    match in_child(owner, || {
                        builder::build(&surroundings, build, &program, &file)
                    }) {
                        Some(answer) => answer,
                        // The child has answered.
                        None => continue,
                    }
                }
                _ => failed("no program"),
            },
            ToZygote::Adopt(state) => match fds.next() {
                Some(file) => match adopt(*state, file) {
                    Ok(adopted) => {
                        template = Some(Rc::new(adopted));
                        FromZygote::Adopted
                    }
                    Err(why) => failed(&why),
                },
                None => failed("no pages"),
            },
            ToZygote::Spawn => match (&template, fds.next()) {
                (Some(template), Some(socket)) => {
                    match spawn(owner, &surroundings, template, socket) {
                        Ok(()) => continue,
                        Err(why) => failed(&why),
                    }
                }
                _ => failed("no template"),
            },
        };
        if owner.send(&answer, &[]).is_err() {
            return 0;
        }
    }
}

fn failed(why: &str) -> FromZygote {
    FromZygote::Failed(Failure::Other(why.to_owned()))
}

fn adopt(state: State, file: OwnedFd) -> Result<Template, String> {
    let pages = Pages::map(&file).map_err(|why| why.to_string())?;
    Template::new(state, file, pages)
}

/// Does something in a child, which answers the owner itself. The answer here is of a child that
/// broke off.
fn in_child(owner: &Channel, work: impl FnOnce() -> Result<State, Failure>) -> Option<FromZygote> {
    let zygote = getpid();
    // SAFETY: this process has one thread, so that the child can do whatever it likes.
    match unsafe { fork() } {
        Err(why) => Some(failed(&format!("fork: {why}"))),
        Ok(ForkResult::Child) => {
            die_with(zygote);
            let answer = match work() {
                Ok(state) => FromZygote::Built(Box::new(state)),
                Err(failure) => FromZygote::Failed(failure),
            };
            let sent = owner.send(&answer, &[]).is_ok();
            std::process::exit(if sent { 0 } else { 1 })
        }
        Ok(ForkResult::Parent { child }) => match wait_for(child) {
            Some(WaitStatus::Exited(_, 0)) => None,
            Some(other) => Some(failed(&format!("the builder ended: {other:?}"))),
            None => Some(failed("the builder is gone")),
        },
    }
}

fn wait_for(child: Pid) -> Option<WaitStatus> {
    loop {
        match waitpid(child, None) {
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return None,
            Ok(status) => return Some(status),
        }
    }
}

fn spawn(
    owner: &Channel,
    surroundings: &Rc<Surroundings>,
    template: &Rc<Template>,
    socket: OwnedFd,
) -> Result<(), String> {
    let zygote = getpid();
    // SAFETY: this process has one thread, so that the child can do whatever it likes.
    match unsafe { fork() } {
        Err(why) => Err(format!("fork: {why}")),
        Ok(ForkResult::Child) => {
            die_with(zygote);
            // The owner's channel is the zygote's alone.
            // SAFETY: nothing in this process uses it after this: `monitor::run` never returns.
            let _closed = unsafe { libc::close(0) };
            let code = monitor::run(surroundings, template, Channel::new(socket));
            std::process::exit(code)
        }
        Ok(ForkResult::Parent { child }) => {
            // SAFETY: a call without pointers.
            let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, child.as_raw(), 0) };
            let pidfd = nix::errno::Errno::result(pidfd).map_err(|why| format!("pidfd: {why}"))?;
            // SAFETY: the kernel just gave it to us.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd as i32) };
            owner
                .send(&FromZygote::Spawned(child.as_raw()), &[pidfd.as_fd()])
                .map_err(|why| why.to_string())
        }
    }
}

/// Forgets children that have ended.
fn reap() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            return;
        }
    }
}
