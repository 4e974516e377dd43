//! A running sandbox, as its owner holds it.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use carlsbad_types::ByteSize;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::process::{Signal, WaitId, WaitIdOptions, pidfd_send_signal, waitid};

use super::plan::{CONTINUE, ENDED, End, PACKET, STOP};
use super::spawn::Started;
use crate::backend::{Exit, Instance, Kill, KillHandle, Stats, Status};
use crate::cgroup::{CgroupLease, Usage};
use crate::error::{Error, Result};
use crate::rootfs::Rootfs;

/// How long stopping all of a sandbox may take.
const FREEZE: Duration = Duration::from_secs(10);

/// What was captured of standard output and error.
#[derive(Debug)]
pub(super) struct Captured([Option<File>; 2]);

impl Captured {
    pub(super) fn new(files: [Option<OwnedFd>; 2]) -> Self {
        Self(files.map(|file| file.map(File::from)))
    }

    fn take(&mut self, stream: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        if let Some(mut file) = self.0[stream].take() {
            let read = file.rewind().and_then(|()| file.read_to_end(&mut bytes));
            read.map_err(Error::io("read", "captured output"))?;
        }
        Ok(bytes)
    }
}

#[derive(Debug)]
pub(super) struct Process {
    pid: u32,
    handle: Arc<Handle>,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Handle {
    process: OwnedFd,
}

#[derive(Debug)]
struct Inner {
    status: OwnedFd,
    /// How the program ended, where that came while something else was waited for.
    end: Option<End>,
    ours: [Option<File>; 3],
    captured: Captured,
    stats: Stats,
    began: Instant,
    exit: Option<Exit>,
    lease: Option<CgroupLease>,
    rootfs: Option<Rootfs>,
}

impl Kill for Handle {
    fn kill(&self) -> Result<()> {
        match pidfd_send_signal(&self.process, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(why) => Err(Error::io("kill", "the sandbox")(why.into())),
        }
    }
}

impl Process {
    pub(super) fn new(
        started: Started,
        status: OwnedFd,
        ours: [Option<File>; 3],
        captured: Captured,
    ) -> Self {
        Self {
            pid: started.pid.as_raw_nonzero().get().unsigned_abs(),
            handle: Arc::new(Handle {
                process: started.process,
            }),
            inner: Mutex::new(Inner {
                status,
                end: None,
                ours,
                captured,
                stats: Stats::default(),
                began: Instant::now(),
                exit: None,
                lease: None,
                rootfs: None,
            }),
        }
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// The program runs: what it was given, and what goes with it.
    pub(super) fn began(
        &mut self,
        stats: Stats,
        lease: Option<CgroupLease>,
        rootfs: Option<Rootfs>,
    ) {
        let inner = self.inner.get_mut().unwrap_or_else(PoisonError::into_inner);
        inner.stats = stats;
        inner.began = Instant::now();
        inner.lease = lease;
        inner.rootfs = rootfs;
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the helper is gone; whether it is. Several may wait.
    fn gone(&self, deadline: Option<Duration>) -> Result<bool> {
        let start = Instant::now();
        loop {
            let left = deadline.map(|deadline| deadline.saturating_sub(start.elapsed()));
            let timeout = match left {
                None => PollTimeout::NONE,
                // Rounded up, so that it is over when poll returns.
                Some(left) if left.is_zero() => PollTimeout::ZERO,
                Some(left) => PollTimeout::try_from(left + Duration::from_millis(1))
                    .unwrap_or(PollTimeout::MAX),
            };
            let mut watched = [PollFd::new(self.handle.process.as_fd(), PollFlags::POLLIN)];
            match poll(&mut watched, timeout) {
                Ok(0) if left.is_some_and(|left| left.is_zero()) => return Ok(false),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => return Ok(true),
                Err(why) => return Err(Error::io("wait for", "the sandbox")(why.into())),
            }
        }
    }

    /// Reaps the helper and says how the program ended.
    fn collect(&self, inner: &mut Inner) -> Result<Exit> {
        if let Some(exit) = &inner.exit {
            return Ok(exit.clone());
        }
        let process = WaitId::PidFd(self.handle.process.as_fd());
        let reaped = waitid(process, WaitIdOptions::EXITED);
        let ended = reaped.map_err(|why| Error::io("wait for", "the sandbox")(why.into()))?;
        while let Some(packet) = inner.hear()? {
            inner.understand(&packet);
        }
        let signal = ended.and_then(|status| status.terminating_signal());
        let (status, truncated) = match inner.end {
            Some(end) => (status_of(&end), end.truncated),
            // Killed before it could say anything: so was the program.
            None => match signal {
                Some(signal) => (Status::Signal(signal), false),
                None => {
                    return Err(Error::HelperGone {
                        what: "sandbox",
                        why: format!("it ended without a word: {ended:?}"),
                    });
                }
            },
        };
        let mut exit = Exit::new(status);
        exit.truncated = truncated;
        exit.stdout = inner.captured.take(0)?;
        exit.stderr = inner.captured.take(1)?;
        inner.stats.run = inner.began.elapsed();
        inner.stats.usage = inner.usage();
        exit.stats = inner.stats.clone();
        // Not before it is dead, and not later: what it had goes back now.
        inner.rootfs = None;
        inner.lease = None;
        inner.exit = Some(exit.clone());
        Ok(exit)
    }
}

fn status_of(end: &End) -> Status {
    if end.timed_out {
        Status::TimedOut
    } else if libc::WIFSIGNALED(end.raw) {
        Status::Signal(libc::WTERMSIG(end.raw))
    } else {
        Status::Code(libc::WEXITSTATUS(end.raw))
    }
}

impl Instance for Process {
    fn wait(&self, deadline: Option<Duration>) -> Result<Exit> {
        let known = self.lock().exit.clone();
        if let Some(exit) = known {
            return Ok(exit);
        }
        if !self.gone(deadline)? {
            return Err(Error::DeadlineExceeded {
                what: "the sandbox's end",
                deadline: deadline.unwrap_or_default(),
            });
        }
        self.collect(&mut self.lock())
    }

    fn kill_handle(&self) -> KillHandle {
        KillHandle::new(Arc::clone(&self.handle) as Arc<dyn Kill>)
    }

    fn stats(&self) -> Result<Stats> {
        let inner = self.lock();
        let mut stats = inner.stats.clone();
        if inner.exit.is_none() {
            stats.run = inner.began.elapsed();
            stats.usage = inner.usage();
            stats.pss = match &inner.lease {
                Some(lease) => {
                    let members = lease.members()?;
                    Some(
                        members
                            .into_iter()
                            .filter_map(pss)
                            .fold(ByteSize::new(0), add),
                    )
                }
                None => pss(self.pid.cast_signed()),
            };
        }
        Ok(stats)
    }

    fn pid(&self) -> Option<u32> {
        Some(self.pid)
    }

    fn pause(&self) -> Result<()> {
        let mut inner = self.lock();
        match &inner.lease {
            Some(lease) => lease.freeze(FREEZE),
            None => inner.say(STOP),
        }
    }

    fn resume(&self) -> Result<()> {
        let mut inner = self.lock();
        match &inner.lease {
            Some(lease) => lease.thaw(),
            None => inner.say(CONTINUE),
        }
    }

    fn take_stdin(&self) -> Option<File> {
        self.lock().ours[0].take()
    }

    fn take_stdout(&self) -> Option<File> {
        self.lock().ours[1].take()
    }

    fn take_stderr(&self) -> Option<File> {
        self.lock().ours[2].take()
    }
}

impl Inner {
    fn usage(&self) -> Option<Usage> {
        self.lease.as_ref()?.usage().ok()
    }

    /// The next packet of the helper; nothing once it is gone.
    fn hear(&self) -> Result<Option<Vec<u8>>> {
        let mut packet = [0; PACKET];
        loop {
            return match nix::unistd::read(&self.status, &mut packet) {
                Ok(0) | Err(nix::errno::Errno::ECONNRESET) => Ok(None),
                Ok(n) => Ok(Some(packet[..n].to_vec())),
                Err(nix::errno::Errno::EINTR) => continue,
                Err(why) => Err(Error::io("hear from", "the sandbox")(why.into())),
            };
        }
    }

    fn understand(&mut self, packet: &[u8]) {
        if let Some((&ENDED, end)) = packet.split_first() {
            self.end = postcard::from_bytes(end).ok();
        }
    }

    /// Has the helper do something to all that it has started, and waits until it has. A sandbox
    /// that has ended is left in peace.
    fn say(&mut self, command: u8) -> Result<()> {
        let said = nix::sys::socket::send(
            self.status.as_raw_fd(),
            &[command],
            nix::sys::socket::MsgFlags::MSG_NOSIGNAL,
        );
        if said.is_err() {
            return Ok(());
        }
        let timeout = PollTimeout::try_from(FREEZE).unwrap_or(PollTimeout::MAX);
        let mut watched = [PollFd::new(self.status.as_fd(), PollFlags::POLLIN)];
        match poll(&mut watched, timeout) {
            Ok(0) => Err(Error::DeadlineExceeded {
                what: "the answer of a sandbox's helper",
                deadline: FREEZE,
            }),
            _ => {
                if let Some(packet) = self.hear()? {
                    self.understand(&packet);
                }
                Ok(())
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.lock().exit.is_some() {
            return;
        }
        let _gone = self.handle.kill();
        // A stopped group does not die.
        if let Some(lease) = &self.lock().lease {
            let _running = lease.thaw();
        }
        let process = WaitId::PidFd(self.handle.process.as_fd());
        let _reaped = waitid(process, WaitIdOptions::EXITED);
    }
}

fn add(a: ByteSize, b: ByteSize) -> ByteSize {
    a.checked_add(b).unwrap_or(a)
}

/// The proportional set size of a process, where it is to be had.
fn pss(pid: i32) -> Option<ByteSize> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find(|line| line.starts_with("Pss:"))?;
    let kib = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(ByteSize::kib(kib))
}
