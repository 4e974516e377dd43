//! The owner's side: zygotes, monitors, and the clones that they run.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use crate::backend::{Exit, Instance, Isolation, Kill, KillHandle, Stats, Status};
use crate::cgroup::{CgroupLease, Usage};
use crate::error::{Error, Result};
use crate::init;

use super::channel::{Channel, Lost, pair};
use super::template::State;
use super::upper::UpperBase;
use super::wire::{
    Build, Confinement, Ended, Failure, FromMonitor, FromZygote, Start, ToMonitor, ToZygote,
};
use super::{BACKEND, interrupt, tree, unavailable};

/// How long a zygote or a monitor may take to answer, on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A zygote of the owner's.
#[derive(Debug)]
pub(super) struct Zygote {
    process: Child,
    channel: Channel,
    pub(super) confinement: Confinement,
}

/// Starts a zygote whose guests see `lower` and write below `upper`.
pub(super) fn start_zygote(
    helper: Option<&Path>,
    lower: Option<BorrowedFd<'_>>,
    upper: Option<&UpperBase>,
) -> Result<Zygote> {
    let no_channel = |why: Errno| Error::io("make", "a channel")(why.into());
    let (ours, theirs) = pair().map_err(no_channel)?;
    let process = init::start(init::ZYGOTE, helper, Stdio::from(theirs))?;
    let mut zygote = Zygote {
        process,
        channel: Channel::new(ours),
        confinement: Confinement::default(),
    };
    let begin = ToZygote::Begin {
        lower: lower.is_some(),
        upper: upper.is_some(),
        secret: upper.map(|base| *base.secret()).unwrap_or_default(),
    };
    let upper = upper.map(UpperBase::directory);
    let fds: Vec<BorrowedFd<'_>> = lower.into_iter().chain(upper).collect();
    match zygote.ask(&begin, &fds, PATIENCE)?.0 {
        FromZygote::Ready(confinement) => zygote.confinement = confinement,
        other => return Err(unexpected(&other)),
    }
    Ok(zygote)
}

fn unexpected(answer: &FromZygote) -> Error {
    Error::Refused(format!("the zygote gave an unexpected answer: {answer:?}"))
}

impl Zygote {
    fn ask(
        &mut self,
        question: &ToZygote,
        fds: &[BorrowedFd<'_>],
        patience: Duration,
    ) -> Result<(FromZygote, Vec<OwnedFd>)> {
        let gone = |why: Lost| Error::HelperGone {
            what: "zygote",
            why: why.to_string(),
        };
        self.channel.send(question, fds).map_err(gone)?;
        // Longer than there is time: for ever.
        let deadline = Instant::now().checked_add(patience);
        match self.channel.receive(deadline) {
            Ok((FromZygote::Failed(failure), _)) => Err(match failure {
                Failure::Kvm(why) => unavailable(why),
                Failure::Program(why) => Error::BadProgram {
                    program: "the program".into(),
                    why,
                },
                Failure::Snapshot(why) => Error::NoSnapshot { why },
                Failure::Other(why) => Error::Refused(why),
            }),
            Ok(answer) => Ok(answer),
            Err(why) => Err(gone(why)),
        }
    }

    /// Makes a template of `program` in `file`.
    pub(super) fn build(&mut self, build: Build, program: &File, file: &OwnedFd) -> Result<State> {
        let patience = build.deadline.saturating_add(PATIENCE);
        let fds = [program.as_fd(), file.as_fd()];
        match self.ask(&ToZygote::Build(build), &fds, patience)?.0 {
            FromZygote::Built(state) => Ok(*state),
            other => Err(unexpected(&other)),
        }
    }

    /// Clones `state` from now on.
    pub(super) fn adopt(&mut self, state: State, file: &OwnedFd) -> Result<()> {
        match self
            .ask(&ToZygote::Adopt(Box::new(state)), &[file.as_fd()], PATIENCE)?
            .0
        {
            FromZygote::Adopted => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    /// Starts a monitor, which gets ready by itself.
    pub(super) fn spawn(&mut self) -> Result<Monitor> {
        let no_channel = |why: Errno| Error::io("make", "a channel")(why.into());
        let (ours, theirs) = pair().map_err(no_channel)?;
        let (answer, fds) = self.ask(&ToZygote::Spawn, &[theirs.as_fd()], PATIENCE)?;
        let FromZygote::Spawned(pid) = answer else {
            return Err(unexpected(&answer));
        };
        let pidfd = fds
            .into_iter()
            .next()
            .ok_or_else(|| Error::Refused("the zygote gave no process".into()))?;
        let monitor = Monitor {
            pid,
            pidfd: Arc::new(pidfd),
            channel: Channel::new(ours),
            is_ready: false,
            resets: false,
            has_served: false,
        };
        // What a process without rights cannot open itself.
        if let Ok(pagemap) = File::open(format!("/proc/{pid}/pagemap")) {
            monitor
                .channel
                .send(&ToMonitor::Equip, &[pagemap.as_fd()])
                .map_err(|why| monitor.gone(why))?;
        }
        Ok(monitor)
    }
}

impl Drop for Zygote {
    fn drop(&mut self) {
        // Its monitors are told by the kernel.
        let _already_gone = self.process.kill();
        let _reaped = self.process.wait();
    }
}

/// What an idle monitor does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    /// It waits for a clone.
    Waits,
    /// It makes its machine, or sets it back.
    Prepares,
    /// Nothing any more.
    Nothing,
}

/// A monitor process.
#[derive(Debug)]
pub(super) struct Monitor {
    pid: i32,
    pidfd: Arc<OwnedFd>,
    channel: Channel,
    /// Whether it has said that it has a machine.
    is_ready: bool,
    /// Whether it is setting its machine back, and will say so.
    resets: bool,
    /// Whether it has run a clone.
    pub(super) has_served: bool,
}

impl Monitor {
    fn gone(&self, why: Lost) -> Error {
        Error::HelperGone {
            what: "virtual machine monitor",
            why: format!("process {}: {why}", self.pid),
        }
    }

    fn receive(&mut self, deadline: Option<Instant>) -> Result<FromMonitor> {
        loop {
            match self.channel.receive(deadline) {
                Ok((message, _)) => return Ok(message),
                Err(Lost::Interrupted) => {}
                Err(why) => return Err(self.gone(why)),
            }
        }
    }

    /// What it is doing, without waiting for it.
    pub(super) fn look(&mut self) -> Doing {
        loop {
            match self.channel.receive(Some(Instant::now())) {
                Ok((FromMonitor::Ready, _)) => self.is_ready = true,
                Ok((FromMonitor::Reset { .. }, _)) => self.resets = false,
                Ok((FromMonitor::Output(..) | FromMonitor::Ended(_), _))
                | Err(Lost::Interrupted) => {}
                Err(Lost::Late) if self.is_ready && !self.resets => return Doing::Waits,
                Err(Lost::Late) => return Doing::Prepares,
                Ok((FromMonitor::Failed(_), _)) | Err(_) => return Doing::Nothing,
            }
        }
    }

    /// Waits until its machine is the template.
    pub(super) fn get_ready(&mut self) -> Result<()> {
        let deadline = Some(Instant::now() + PATIENCE);
        while !self.is_ready || self.resets {
            match self.receive(deadline)? {
                FromMonitor::Ready => self.is_ready = true,
                FromMonitor::Reset { .. } => self.resets = false,
                FromMonitor::Failed(why) => return Err(Error::Refused(why)),
                FromMonitor::Output(..) | FromMonitor::Ended(_) => {}
            }
        }
        Ok(())
    }

    /// Lets it run a clone.
    pub(super) fn start(&mut self, start: Start, fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.has_served = true;
        self.channel
            .send(&ToMonitor::Start(Box::new(start)), fds)
            .map_err(|why| self.gone(why))
    }

    /// Its process.
    pub(super) const fn pid(&self) -> i32 {
        self.pid
    }

    fn signal(&self, signal: i32) -> Result<()> {
        signal_process(&self.pidfd, signal)
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _already_gone = self.signal(libc::SIGKILL);
    }
}

fn signal_process(pidfd: &OwnedFd, signal: i32) -> Result<()> {
    send_signal(pidfd, signal, std::ptr::null())
}

/// As `sigqueue` does.
fn signal_queue(pidfd: &OwnedFd, signal: i32) -> Result<()> {
    // SAFETY: all zeros is a valid value of this plain structure.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    (info.si_signo, info.si_code) = (signal, libc::SI_QUEUE);
    send_signal(pidfd, signal, &raw const info)
}

fn send_signal(pidfd: &OwnedFd, signal: i32, info: *const libc::siginfo_t) -> Result<()> {
    // SAFETY: a descriptor of a process, a number, and a structure or nothing.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            info,
            0,
        )
    };
    match Errno::result(sent) {
        Ok(_) | Err(Errno::ESRCH) => Ok(()),
        Err(why) => Err(Error::io("signal", "a virtual machine monitor")(why.into())),
    }
}

/// What ends a clone: nothing any more once it has ended, since its process may serve another.
#[derive(Debug)]
struct Target(Mutex<Option<Arc<OwnedFd>>>);

impl Kill for Target {
    fn kill(&self) -> Result<()> {
        let Some(pidfd) = lock(&self.0).clone() else {
            return Ok(());
        };
        // So that what it has written is not lost, and what it has used is known.
        signal_queue(&pidfd, interrupt::KILL as i32)?;
        signal_process(&pidfd, libc::SIGCONT)?;
        let began = Instant::now();
        while began.elapsed() < TO_END {
            if lock(&self.0).is_none() || is_dead(&pidfd) {
                return Ok(());
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        // Somebody has taken it over, or it has more to tell than anybody reads.
        match &*lock(&self.0) {
            Some(pidfd) => signal_process(pidfd, libc::SIGKILL),
            None => Ok(()),
        }
    }
}

/// How long a guest that is killed has to say what it has written.
const TO_END: Duration = Duration::from_secs(1);

fn is_dead(pidfd: &OwnedFd) -> bool {
    super::channel::wait_readable(pidfd.as_fd(), Some(Instant::now())).is_ok()
}

/// Gets monitors back, and the names of writable layers that are of no use any more.
pub(super) trait Home: Send + Sync + std::fmt::Debug {
    /// A monitor that can serve another clone, once it is ready.
    fn take_back(&self, monitor: Monitor);
    /// A monitor that has ended without having cleaned up.
    fn clean_up(&self, pid: i32);
}

/// The ends of pipes that the owner keeps.
#[derive(Debug, Default)]
pub(super) struct Pipes {
    pub(super) stdin: Option<File>,
    pub(super) stdout: Option<File>,
    pub(super) stderr: Option<File>,
}

/// A clone.
#[derive(Debug)]
pub(super) struct Clone {
    state: Mutex<CloneState>,
    /// Told when somebody who received messages does so no more.
    changed: Condvar,
    target: Arc<Target>,
    home: Arc<dyn Home>,
    pipes: Mutex<Pipes>,
    isolation: Isolation,
    pid: i32,
    began: Instant,
    // Given back when its process is dead.
    cgroup: Option<CgroupLease>,
}

#[derive(Debug)]
struct CloneState {
    /// Gone while a thread receives from it, and after the end.
    monitor: Option<Monitor>,
    /// Whether a thread receives.
    receives: bool,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    end: Option<std::result::Result<Exit, String>>,
    reset: Option<(Duration, u64, Vec<String>)>,
}

impl Clone {
    pub(super) fn new(
        monitor: Monitor,
        home: Arc<dyn Home>,
        pipes: Pipes,
        isolation: Isolation,
        cgroup: Option<CgroupLease>,
    ) -> Self {
        Self {
            target: Arc::new(Target(Mutex::new(Some(Arc::clone(&monitor.pidfd))))),
            pid: monitor.pid,
            state: Mutex::new(CloneState {
                monitor: Some(monitor),
                receives: false,
                stdout: Vec::new(),
                stderr: Vec::new(),
                end: None,
                reset: None,
            }),
            changed: Condvar::new(),
            home,
            pipes: Mutex::new(pipes),
            isolation,
            began: Instant::now(),
            cgroup,
        }
    }

    fn usage(&self) -> Option<Usage> {
        self.cgroup.as_ref()?.usage().ok()
    }

    fn stats_of(&self, ended: &Ended) -> Stats {
        Stats {
            backend: BACKEND.to_owned(),
            isolation: Some(self.isolation),
            template_hit: true,
            recycled: ended.recycled,
            split_rootfs: ended.split_rootfs,
            pooled_cgroup: self.cgroup.is_some(),
            usage: self.usage(),
            pid: Some(self.pid.unsigned_abs()),
            start: ended.start,
            run: ended.run,
            exits: ended.exits,
            served_inside: ended.served_inside,
            ..Stats::default()
        }
    }

    /// Takes a message in. Says whether the clone has ended.
    fn take_in(&self, state: &mut CloneState, message: Result<FromMonitor>, monitor: &mut Monitor) {
        match message {
            Ok(FromMonitor::Output(1, bytes)) => state.stdout.extend_from_slice(&bytes),
            Ok(FromMonitor::Output(_, bytes)) => state.stderr.extend_from_slice(&bytes),
            Ok(FromMonitor::Ready) => monitor.is_ready = true,
            Ok(FromMonitor::Reset {
                took,
                pages,
                differences,
            }) => {
                monitor.resets = false;
                if state.end.is_some() {
                    state.reset = Some((took, pages, differences));
                }
            }
            Ok(FromMonitor::Ended(ended)) => {
                // Before anybody else can get the process.
                *lock(&self.target.0) = None;
                state.stdout.extend_from_slice(&ended.stdout);
                state.stderr.extend_from_slice(&ended.stderr);
                monitor.resets = ended.goes_on;
                state.end = Some(Ok(Exit {
                    status: ended.status,
                    stdout: std::mem::take(&mut state.stdout),
                    stderr: std::mem::take(&mut state.stderr),
                    truncated: ended.truncated,
                    stats: self.stats_of(&ended),
                }));
            }
            // After the end it is the reset that failed: the end stays what it was.
            Ok(FromMonitor::Failed(_)) if state.end.is_some() => {
                state.reset = None;
            }
            Ok(FromMonitor::Failed(why)) => {
                *lock(&self.target.0) = None;
                state.end = Some(Err(why));
            }
            Err(_) if state.end.is_some() => self.home.clean_up(self.pid),
            Err(_) => {
                *lock(&self.target.0) = None;
                // It was killed, by a handle or by the kernel: that is an end of its own.
                state.end = Some(Ok(Exit {
                    status: Status::Signal(libc::SIGKILL),
                    stdout: std::mem::take(&mut state.stdout),
                    stderr: std::mem::take(&mut state.stderr),
                    truncated: false,
                    stats: Stats {
                        backend: BACKEND.to_owned(),
                        isolation: Some(self.isolation),
                        template_hit: true,
                        pooled_cgroup: self.cgroup.is_some(),
                        usage: self.usage(),
                        pid: Some(self.pid.unsigned_abs()),
                        run: self.began.elapsed(),
                        ..Stats::default()
                    },
                }));
                self.home.clean_up(self.pid);
            }
        }
    }

    fn late(deadline: Duration) -> Error {
        Error::DeadlineExceeded {
            what: "the sandbox",
            deadline,
        }
    }

    /// After the end: waits until the machine is set back, and says what that took.
    pub(super) fn wait_reset(&self) -> Option<(Duration, u64, Vec<String>)> {
        let mut state = lock(&self.state);
        if state.end.is_none() || state.receives {
            return None;
        }
        let mut monitor = state.monitor.take()?;
        let deadline = Some(Instant::now() + PATIENCE);
        while monitor.resets {
            let message = monitor.receive(deadline);
            let failed = message.is_err();
            self.take_in(&mut state, message, &mut monitor);
            if failed {
                return None;
            }
        }
        state.monitor = Some(monitor);
        state.reset.clone()
    }
}

impl Instance for Clone {
    fn wait(&self, deadline: Option<Duration>) -> Result<Exit> {
        let until = deadline.and_then(|time| Instant::now().checked_add(time));
        let mut state = lock(&self.state);
        loop {
            if let Some(end) = &state.end {
                return end.clone().map_err(Error::Refused);
            }
            let is_late = until.is_some_and(|until| Instant::now() >= until);
            if let (true, Some(time)) = (is_late && state.receives, deadline) {
                return Err(Self::late(time));
            }
            let Some(mut monitor) = state.monitor.take() else {
                // Another thread receives for all.
                state = match until {
                    None => self
                        .changed
                        .wait(state)
                        .unwrap_or_else(PoisonError::into_inner),
                    Some(until) => {
                        let left = until.saturating_duration_since(Instant::now());
                        let waited = self.changed.wait_timeout(state, left);
                        waited.unwrap_or_else(PoisonError::into_inner).0
                    }
                };
                continue;
            };
            state.receives = true;
            drop(state);
            let message = monitor.receive(until);
            state = lock(&self.state);
            state.receives = false;
            let is_late = matches!(&message, Err(Error::HelperGone { .. }))
                && until.is_some_and(|until| Instant::now() >= until)
                && !monitor.channel.is_ready();
            if !is_late {
                self.take_in(&mut state, message, &mut monitor);
            }
            state.monitor = Some(monitor);
            self.changed.notify_all();
            if let (true, Some(time)) = (is_late, deadline) {
                return Err(Self::late(time));
            }
        }
    }

    fn kill_handle(&self) -> KillHandle {
        KillHandle::new(Arc::clone(&self.target) as Arc<dyn Kill>)
    }

    fn stats(&self) -> Result<Stats> {
        let reset = self.wait_reset();
        let state = lock(&self.state);
        if let Some(Ok(exit)) = &state.end {
            let mut stats = exit.stats.clone();
            if let Some((took, pages, _)) = reset {
                (stats.reset, stats.dirty_pages) = (took, pages);
            }
            return Ok(stats);
        }
        Ok(Stats {
            backend: BACKEND.to_owned(),
            isolation: Some(self.isolation),
            template_hit: true,
            pooled_cgroup: self.cgroup.is_some(),
            usage: self.usage(),
            pid: Some(self.pid.unsigned_abs()),
            run: self.began.elapsed(),
            pss: pss(self.pid),
            ..Stats::default()
        })
    }

    fn pid(&self) -> Option<u32> {
        lock(&self.target.0)
            .as_ref()
            .map(|_| self.pid.unsigned_abs())
    }

    fn pause(&self) -> Result<()> {
        // It cannot be another's number while the target is held.
        if lock(&self.target.0).as_ref().is_some() {
            tree::stop(self.pid);
        }
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        if lock(&self.target.0).as_ref().is_some() {
            tree::resume(self.pid);
        }
        Ok(())
    }

    fn take_stdin(&self) -> Option<File> {
        lock(&self.pipes).stdin.take()
    }

    fn take_stdout(&self) -> Option<File> {
        lock(&self.pipes).stdout.take()
    }

    fn take_stderr(&self) -> Option<File> {
        lock(&self.pipes).stderr.take()
    }

    fn reset_differences(&self) -> Option<Vec<String>> {
        self.wait_reset().map(|(_, _, differences)| differences)
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        let Some(monitor) = state.monitor.take() else {
            return;
        };
        if state.end.is_some() && (monitor.resets || state.reset.is_some()) {
            self.home.take_back(monitor);
            return;
        }
        let _already_gone = monitor.signal(libc::SIGKILL);
        // Its writable layer can only be deleted once it is dead.
        let _dead = wait_dead(&monitor.pidfd);
        self.home.clean_up(monitor.pid);
    }
}

/// Waits for a process that was killed.
fn wait_dead(pidfd: &OwnedFd) -> std::result::Result<(), Lost> {
    super::channel::wait_readable(pidfd.as_fd(), Some(Instant::now() + PATIENCE))
}

/// PSS of a process.
fn pss(pid: i32) -> Option<carlsbad_types::ByteSize> {
    let path = PathBuf::from(format!("/proc/{pid}/smaps_rollup"));
    let text = std::fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kib = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(carlsbad_types::ByteSize::kib(kib))
}
