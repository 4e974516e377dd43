//! The helper's start: one `clone3` into new namespaces, and on version 2 into the control group,
//! with an `exec` straight after. Between the two the child makes system calls only, on what its
//! parent has prepared: the parent may have other threads.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use rustix::process::Pid;

/// The namespaces that the first process of a sandbox is the first in.
const NAMESPACES: u64 = (libc::CLONE_NEWPID
    | libc::CLONE_NEWNS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP) as u64;
/// linux/sched.h
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// Descriptors are copied above this number first, so that none is overwritten before its turn.
const ASIDE: RawFd = 64;

/// `struct clone_args` (linux/sched.h), as of CLONE_INTO_CGROUP.
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// A process that was started, and a descriptor of it.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) pid: Pid,
    pub(super) process: OwnedFd,
}

/// Starts `program`, which is this one again or stands in for it, as `name`, with `descriptors` under the numbers from 0 on, in
/// namespaces of its own (`contained`), in the control group `cgroup`.
pub(super) fn start_again(
    program: &CStr,
    name: &CStr,
    descriptors: &[BorrowedFd<'_>],
    contained: bool,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Started> {
    let mut aside = Vec::with_capacity(descriptors.len());
    for descriptor in descriptors {
        aside.push(rustix::io::fcntl_dupfd_cloexec(descriptor, ASIDE)?);
    }
    let numbers: Vec<RawFd> = aside.iter().map(AsRawFd::as_raw_fd).collect();
    let arguments = [name.as_ptr(), std::ptr::null()];
    let environment = [std::ptr::null()];
    let mut pidfd: RawFd = -1;
    let mut clone = CloneArguments {
        flags: libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArguments::default()
    };
    if contained {
        clone.flags |= NAMESPACES;
    }
    if let Some(cgroup) = cgroup {
        clone.flags |= CLONE_INTO_CGROUP;
        clone.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: without CLONE_VM the child has a copy of this memory; the structure has the size that
    // is passed, and outlives the call.
    let pid = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut clone,
            size_of::<CloneArguments>(),
        )
    };
    match pid {
        0 => {
            for (wanted, number) in (0..).zip(&numbers) {
                // SAFETY: async-signal-safe, on numbers that the parent opened for this.
                if unsafe { libc::dup2(*number, wanted) } < 0 {
                    // SAFETY: async-signal-safe; nothing of the parent's is run.
                    unsafe { libc::_exit(126) };
                }
            }
            // SAFETY: async-signal-safe; the lists end with null and were made by the parent.
            unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
            // SAFETY: as above.
            unsafe { libc::_exit(127) }
        }
        pid if pid > 0 => Ok(Started {
            pid: i32::try_from(pid)
                .ok()
                .and_then(Pid::from_raw)
                .ok_or(io::ErrorKind::InvalidData)?,
            // SAFETY: the kernel has put a new descriptor there, which is ours.
            process: unsafe { OwnedFd::from_raw_fd(pidfd) },
        }),
        _ => Err(io::Error::last_os_error()),
    }
}

impl Started {
    /// Ends it, and waits for its end.
    pub(super) fn reap(&self) {
        use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

        let _gone = pidfd_send_signal(&self.process, Signal::KILL);
        let _reaped = waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED);
    }
}
