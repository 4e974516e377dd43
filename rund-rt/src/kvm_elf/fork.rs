//! Processes of a guest: `fork` forks the monitor, so that pipes, shared offsets and `wait` are the
//! host's own. The new process has a machine of its own, since a machine belongs to the memory of
//! the process that made it.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::unistd::{ForkResult, Pid, getpid, getppid};

use crate::backend::Status;

use super::calls::Kernel;
use super::calls::children::Report;
use super::calls::table::{HostFile, Open};
use super::guest::{End, Guest};
use super::interrupt;
use super::machine::Machine;
use super::shim;

/// Exit code of a process whose machine cannot go on.
const BROKEN: i32 = 125;

impl Guest {
    /// Makes a second process of the guest. Gives 0 in the new one.
    ///
    /// # Errors
    /// Why there is none and this one cannot go on either.
    pub(super) fn fork(&mut self, stack: u64, child_id_at: u64) -> Result<i64, String> {
        self.kernel.outputs.flush();
        self.kernel
            .children
            .prepare()
            .map_err(|why| why.to_string())?;
        self.kernel.relatives = true;
        self.windows.forget();
        self.windows.withdraw(&self.memory);
        share_input(&mut self.kernel).map_err(|why| format!("standard input: {why}"))?;
        let mut saved = self.machine.save_program().map_err(|why| why.to_string())?;
        let (here, report) = match Report::new() {
            Ok(ends) => ends,
            Err(why) => return Ok(-i64::from(why as i32)),
        };
        let account = self.kernel.account;
        let place = match account.processes.claim() {
            // Some may be about to leave.
            Err(_) if self.kernel.children.settle() => account.processes.claim(),
            other => other,
        };
        let place = match place {
            Ok(place) => place,
            Err(why) => return Ok(-i64::from(why as i32)),
        };
        self.kernel.share_files();
        let parent = getpid();
        // SAFETY: this process has one thread, so that the new one can do whatever it likes.
        let forked = match unsafe { nix::unistd::fork() } {
            // Perhaps for the number of processes, of which those that are leaving are some.
            // SAFETY: as above.
            Err(Errno::EAGAIN) if self.kernel.children.settle() => unsafe { nix::unistd::fork() },
            other => other,
        };
        match forked {
            Err(why) => {
                self.kernel.unshare_files();
                place.store(0, Ordering::Release);
                Ok(-i64::from(why as i32))
            }
            Ok(ForkResult::Parent { child }) => {
                self.kernel.children.add(child, here);
                Ok(i64::from(child.as_raw()))
            }
            Ok(ForkResult::Child) => {
                place.store(getpid().as_raw(), Ordering::Release);
                die_with(parent);
                self.is_child = true;
                self.is_template = false;
                self.kernel.children.forget();
                drop(here);
                self.report = Some(report);
                self.kernel.signals.forget_pending();
                let identity = &mut self.kernel.identity;
                (identity.ppid, identity.pid) = (identity.pid, getpid().as_raw());
                // The machine is the parent's, whose memory it has. The call is answered, not made
                // again.
                saved.regs.rip = shim::exit_address() + 2;
                interrupt::forget();
                self.machine = Machine::new(&self.host, &self.memory, self.root, self.way_back)
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

    /// The end of a process that the guest made: this process ends in the same way.
    pub(super) fn end_child(&mut self, end: End) -> ! {
        self.kernel.outputs.flush();
        // Whoever is told of the end is told that nothing of it is left: no process of its own,
        // and no end of a pipe.
        self.kernel.children.end();
        self.kernel.close_files();
        if let Some(report) = self.report.take() {
            report.tell(match end {
                End::Status(Status::Code(code)) => (code & 0xff) << 8,
                End::Status(Status::Signal(signal)) => signal & 0x7f,
                _ => BROKEN << 8,
            });
        }
        let code = match end {
            End::Status(Status::Code(code)) => code,
            End::Status(Status::Signal(signal)) => {
                // SAFETY: the default action of a signal, which ends this process.
                unsafe { libc::signal(signal, libc::SIG_DFL) };
                // SAFETY: as above.
                unsafe { libc::raise(signal) };
                128 + signal
            }
            _ => BROKEN,
        };
        // SAFETY: nothing of this process is needed any more; what was inherited is not torn down.
        unsafe { libc::_exit(code) }
    }
}

/// Ends this process when `parent` does.
pub fn die_with(parent: Pid) {
    let _always = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
    if getppid() != parent {
        std::process::exit(0);
    }
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
            Errno::result(unsafe { libc::lseek(fd.as_raw_fd(), 0, libc::SEEK_SET) })?;
            *open = Open::Host(HostFile::pipe(fd));
        }
    }
    Ok(())
}
