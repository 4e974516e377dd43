//! A guest process' children: processes of the host's, each with a machine of its own.
//!
//! To take a machine down takes the host half a millisecond, for which nobody has to wait: a child
//! closes its files, says by a pipe how it ends, and ends then. One that was killed says nothing;
//! the end of its pipe tells that.
//!
//! So the host's SIGCHLD may come after `wait` has given the child, where on Linux it comes before.
//! The guest gets one signal for each end, and none after `wait`: it is raised when the child is
//! given, unless it has come already, and the host's is dropped then.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// Children of one process.
#[derive(Debug, Default)]
pub struct Children {
    alive: Vec<Child>,
    /// Those whose end was told, and that the host still has.
    leaving: Vec<Leaving>,
    /// Signals of the host's that are there, or will be, and that the guest has had already.
    had: usize,
    /// Whether processes whose parent has ended come to this one, which can wait for them then.
    adopts: bool,
}

#[derive(Debug)]
struct Child {
    pid: Pid,
    report: OwnedFd,
    /// Whether the guest has had the signal of its end.
    signalled: bool,
}

#[derive(Debug)]
struct Leaving {
    pid: Pid,
    /// Whether the host's signal is still to come.
    signals: bool,
}

/// A child that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// Its number.
    pub pid: i32,
    /// How, as `wait` gives it.
    pub status: i32,
    /// Whether the guest is to get SIGCHLD for it.
    pub signal: bool,
}

/// Where a process says how it ends.
#[derive(Debug)]
pub struct Report(OwnedFd);

impl Report {
    /// The two ends of a report: who waits, and who ends.
    ///
    /// # Errors
    /// Where there is no descriptor left.
    pub fn new() -> nix::Result<(OwnedFd, Self)> {
        let (here, there) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
        Ok((here, Self(there)))
    }

    /// Says it, as `wait` gives it.
    pub fn tell(self, status: i32) {
        let _nobody_waits = nix::unistd::write(&self.0, &status.to_le_bytes());
    }
}

impl Children {
    /// How many are alive.
    pub const fn len(&self) -> usize {
        self.alive.len()
    }

    /// Whether `pid` is one of those.
    pub fn contains(&self, pid: i32) -> bool {
        self.alive.iter().any(|child| child.pid.as_raw() == pid)
    }

    /// Before there is one.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn prepare(&mut self) -> nix::Result<()> {
        if !self.adopts {
            nix::sys::prctl::set_child_subreaper(true)?;
            self.adopts = true;
        }
        Ok(())
    }

    /// There is a new one.
    pub fn add(&mut self, pid: Pid, report: OwnedFd) {
        self.alive.push(Child {
            pid,
            report,
            signalled: false,
        });
    }

    /// In a new process: they are the parent's.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// Waits for `pid`, or for any where it is not positive. Gives nothing where `now` is set and
    /// none has ended.
    ///
    /// # Errors
    /// ECHILD where there is none to wait for, EINTR for a signal.
    pub fn wait(&mut self, pid: i32, now: bool) -> Result<Option<Ended>, Errno> {
        self.reap();
        let wanted = |child: &&Child| pid <= 0 || child.pid.as_raw() == pid;
        let mut ends: Vec<_> = (self.alive.iter().filter(wanted))
            .map(|child| PollFd::new(child.report.as_fd(), PollFlags::POLLIN))
            .collect();
        if ends.is_empty() {
            return Err(Errno::ECHILD);
        }
        let timeout = if now {
            PollTimeout::ZERO
        } else {
            PollTimeout::NONE
        };
        poll(&mut ends, timeout)?;
        let ended = ends.iter().position(|end| end.any() == Some(true));
        let Some(ended) = ended else { return Ok(None) };
        let found = (self.alive.iter().enumerate())
            .filter(|(_, child)| wanted(child))
            .nth(ended)
            .map(|(i, _)| i);
        let Some(i) = found else { return Ok(None) };
        let child = self.alive.remove(i);
        let mut status = [0; 4];
        let status = match nix::unistd::read(&child.report, &mut status) {
            Ok(4) => {
                self.leaving.push(Leaving {
                    pid: child.pid,
                    signals: !child.signalled,
                });
                i32::from_le_bytes(status)
            }
            // It was killed.
            _ => {
                self.had += usize::from(!child.signalled);
                loop {
                    match waitpid(child.pid, None) {
                        Err(Errno::EINTR) => {}
                        Ok(WaitStatus::Exited(_, code)) => break code << 8,
                        Ok(WaitStatus::Signaled(_, signal, _)) => break signal as i32,
                        _ => break libc::SIGKILL,
                    }
                }
            }
        };
        Ok(Some(Ended {
            pid: child.pid.as_raw(),
            status,
            signal: !child.signalled,
        }))
    }

    /// SIGCHLD came from the host. Says whether the guest is to get it.
    pub fn signal_came(&mut self) -> bool {
        self.reap();
        let mut news = false;
        for child in &mut self.alive {
            let mut end = [PollFd::new(child.report.as_fd(), PollFlags::POLLIN)];
            if !child.signalled && poll(&mut end, PollTimeout::ZERO) == Ok(1) {
                child.signalled = true;
                news = true;
            }
        }
        // One signal may stand for several ends.
        std::mem::take(&mut self.had) == 0 || news
    }

    /// Forgets those that have left.
    pub fn reap(&mut self) {
        let had = &mut self.had;
        self.leaving.retain(|child| {
            let found = waitpid(child.pid, Some(WaitPidFlag::WNOHANG));
            let stays = found == Ok(WaitStatus::StillAlive);
            *had += usize::from(!stays && child.signals);
            stays
        });
    }

    /// Waits until all that are leaving have left. Says whether there were any.
    pub fn settle(&mut self) -> bool {
        let any = !self.leaving.is_empty();
        for child in self.leaving.drain(..) {
            while waitpid(child.pid, None) == Err(Errno::EINTR) {}
            self.had += usize::from(child.signals);
        }
        any
    }

    /// Ends them, and theirs. Says whether none is left.
    pub fn end(&mut self) -> bool {
        /// A process without work to do ends in less; one that does not was taken over.
        const PATIENCE: Duration = Duration::from_secs(1);
        if !self.adopts {
            return true;
        }
        self.leaving.clear();
        for child in self.alive.drain(..) {
            let _already_gone = kill(child.pid, Signal::SIGKILL);
        }
        let began = Instant::now();
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Err(Errno::ECHILD) => return true,
                Ok(WaitStatus::StillAlive) if began.elapsed() > PATIENCE => return false,
                Ok(WaitStatus::StillAlive) => std::thread::sleep(Duration::from_micros(50)),
                _ => {}
            }
        }
    }
}
