//! The backend `qemu`: a real Linux guest in a QEMU microvm, cloned from a template that was saved
//! when it had booted.
//!
//! The template's memory is a memfd that the first machine wrote. Every clone maps it privately, so
//! that its pages are shared until they are written; the device state is read from a second memfd.
//! Where the processor has VMX or SVM, and `/dev/kvm` can be opened, the machine is a hardware
//! one; else QEMU emulates it.

mod guest;
mod machine;
mod reseed;

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use carlsbad_types::ByteSize;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;

use crate::backend::{
    Backend, Capabilities, CloneSpec, Exit, Instance, Isolation, Kill, KillHandle, Output,
    SavedState, Stats, Status, Stdin, Template, TemplateSpec,
};
use crate::error::{Error, Result};
use guest::{Identity, READY, Transcript, find};
use machine::{Machine, Memory, Monitor, Shape, failed};

pub use guest::initramfs;

/// What this backend is called.
const BACKEND: &str = "qemu";
const PROGRAM: &str = "qemu-system-x86_64";
/// How long a clone may take to be there.
const START: Duration = Duration::from_secs(60);
const CHUNK: usize = 1 << 16;

/// Sandboxes that are Linux guests of QEMU: [`Isolation::HardwareVm`] or
/// [`Isolation::EmulatedVm`].
///
/// A template is a kernel ([`TemplateSpec::program`]) and an initial file system
/// ([`TemplateSpec::initramfs`], see [`initramfs`](crate::qemu_initramfs)). A clone's arguments are
/// a command in the guest. Its standard output and error come over one serial line, both as
/// [`Exit::stdout`]. Each clone has a thread, `rund-qemu`, which is joined when the clone is
/// dropped.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
}

impl Default for Qemu {
    fn default() -> Self {
        Self {
            program: PROGRAM.into(),
        }
    }
}

impl Qemu {
    /// With `qemu-system-x86_64` from `PATH`.
    pub fn new() -> Self {
        Self::default()
    }

    /// With this QEMU.
    #[must_use]
    pub fn program(mut self, program: impl Into<PathBuf>) -> Self {
        self.program = program.into();
        self
    }

    fn shape(&self, spec: &TemplateSpec) -> Result<Shape> {
        let Some(initramfs) = &spec.initramfs else {
            return Err(Error::BadSetting {
                what: "initramfs",
                why: "a guest needs one: rund_rt::qemu_initramfs makes it".to_owned(),
            });
        };
        for path in [&spec.program, initramfs] {
            File::open(path).map_err(Error::io("open", path))?;
        }
        Ok(Shape {
            program: self.program.clone(),
            accelerator: accelerator(),
            kernel: spec.program.clone(),
            initramfs: initramfs.clone(),
            memory: spec.memory,
            arguments: String::new(),
        })
    }

    /// Boots a machine of this shape up to the point where it would be saved, and runs a clone's
    /// command in it without saving it: what a clone is compared with.
    ///
    /// # Errors
    /// As [`clone_from`](Backend::clone_from).
    pub fn cold_boot(&self, spec: &TemplateSpec, clone: CloneSpec) -> Result<Box<dyn Instance>> {
        let shape = self.shape(spec)?;
        let memory = memory_file(shape.memory)?;
        begin(Origin::Cold { shape, memory }, spec, clone)
    }
}

/// `kvm` where there is a KVM that boots an unmodified kernel: one by VMX or SVM.
fn accelerator() -> &'static str {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = text.lines().find(|line| line.starts_with("flags"));
    let hardware =
        flags.is_some_and(|line| line.split(' ').any(|flag| ["vmx", "svm"].contains(&flag)));
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    if hardware && kvm.is_ok() {
        "kvm"
    } else {
        "tcg"
    }
}

fn isolation() -> Isolation {
    match accelerator() {
        "kvm" => Isolation::HardwareVm,
        _ => Isolation::EmulatedVm,
    }
}

fn memory_file(size: ByteSize) -> Result<OwnedFd> {
    let failed = || failed("make a file for its memory");
    let file = memfd_create("rund-qemu", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(failed())?;
    ftruncate(&file, size.get()).map_err(failed())?;
    Ok(file)
}

#[derive(Debug)]
struct Saved {
    spec: TemplateSpec,
    shape: Shape,
    memory: OwnedFd,
    state: OwnedFd,
}

/// What a template is, behind its counted handle: the thread of a clone holds it as well.
#[derive(Debug)]
struct Kept(Arc<Saved>);

impl SavedState for Kept {
    fn backend(&self) -> &'static str {
        BACKEND
    }

    fn size(&self) -> ByteSize {
        let blocks = |file: &OwnedFd| {
            let stat = rustix::fs::fstat(file);
            stat.map_or(0, |stat| u64::try_from(stat.st_blocks).unwrap_or(0) * 512)
        };
        ByteSize::new(blocks(&self.0.memory) + blocks(&self.0.state))
    }

    fn save(&self, path: &Path) -> Result<()> {
        Err(Error::BadSetting {
            what: "saving a template",
            why: format!(
                "backend {BACKEND} keeps templates in memory, and does not write {}",
                path.display()
            ),
        })
    }
}

impl Backend for Qemu {
    fn name(&self) -> &'static str {
        BACKEND
    }

    fn probe(&self) -> Result<Capabilities> {
        let unavailable = |why: String| Error::Unavailable {
            backend: BACKEND,
            why,
            fix: "apt install qemu-system-x86",
        };
        let done = Command::new(&self.program)
            .arg("--version")
            .stdin(Stdio::null())
            .output()
            .map_err(|why| unavailable(format!("{}: {why}", self.program.display())))?;
        if !done.status.success() {
            return Err(unavailable(format!(
                "{}: {}",
                self.program.display(),
                done.status
            )));
        }
        let mut found = Capabilities::new(BACKEND, isolation());
        let version = String::from_utf8_lossy(&done.stdout);
        found
            .details
            .extend(version.lines().next().map(str::to_owned));
        found.details.push(format!("accelerator {}", accelerator()));
        Ok(found)
    }

    fn build_template(&self, spec: &TemplateSpec) -> Result<Template> {
        let shape = self.shape(spec)?;
        let memory = memory_file(shape.memory)?;
        let state = memory_file(ByteSize::new(0))?;
        let deadline = Instant::now() + spec.deadline;
        // This thread lives until the machine has ended: `save` waits for that.
        let mut machine = Machine::start(&shape, &memory, Memory::Shared, deadline)?;
        let output = machine.output.take();
        // A guest that never gets there would be waited for for ever.
        let watchdog = Watchdog::start(machine.pid(), spec.deadline)?;
        let reached = output.map(read_until_ready);
        drop(watchdog);
        match reached {
            Some(Ok(())) => {}
            Some(Err(why)) => return Err(Error::NoSnapshot { why }),
            None => return Err(failed("read its console")("there is none")),
        }
        machine.save(&state, deadline)?;
        // Nobody writes to them any more: not even a clone that is broken into.
        let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW;
        for file in [&memory, &state] {
            fcntl_add_seals(file, seals).map_err(failed("seal the template"))?;
        }
        Ok(Template::new(Arc::new(Kept(Arc::new(Saved {
            spec: spec.clone(),
            shape,
            memory,
            state,
        })))))
    }

    fn load_template(&self, path: &Path, _root: Option<&Path>) -> Result<Template> {
        Err(Error::BadTemplate {
            path: path.to_owned(),
            why: format!("backend {BACKEND} keeps no templates on disk"),
        })
    }

    fn clone_from(&self, template: &Template, clone: CloneSpec) -> Result<Box<dyn Instance>> {
        let Some(Kept(saved)) = template.state::<Kept>() else {
            return Err(Error::ForeignTemplate {
                built_by: template.backend(),
                backend: BACKEND,
            });
        };
        begin(Origin::Template(Arc::clone(saved)), &saved.spec, clone)
    }
}

/// Reads the console up to the mark; else what was said instead.
fn read_until_ready(mut console: impl Read) -> std::result::Result<(), String> {
    let mut seen = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match console.read(&mut chunk) {
            Ok(0) | Err(_) => {
                let text = String::from_utf8_lossy(&seen);
                let last: Vec<_> = text.lines().rev().take(3).collect();
                return Err(format!("its console ended with {last:?}"));
            }
            Ok(n) => seen.extend(&chunk[..n]),
        }
        if find(&seen, READY).is_some() {
            return Ok(());
        }
    }
}

/// Kills a process when its time is over. Its thread is joined when it is dropped.
struct Watchdog {
    done: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
    fired: Arc<Mutex<bool>>,
}

impl Watchdog {
    fn start(pid: u32, patience: Duration) -> Result<Self> {
        let handle = Handle::of(pid)?;
        let (done, waits) = channel();
        let fired = Arc::new(Mutex::new(false));
        let flag = Arc::clone(&fired);
        let thread = thread::Builder::new()
            .name("rund-qemu-time".to_owned())
            .spawn(move || {
                if waits.recv_timeout(patience) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    *flag.lock().unwrap_or_else(PoisonError::into_inner) = true;
                    let _gone = handle.kill();
                }
            })
            .map_err(failed("watch its time"))?;
        Ok(Self {
            done: Some(done),
            thread: Some(thread),
            fired,
        })
    }

    fn has_fired(&self) -> bool {
        *self.fired.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        drop(self.done.take());
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}

/// Where a machine begins.
enum Origin {
    Template(Arc<Saved>),
    Cold { shape: Shape, memory: OwnedFd },
}

#[derive(Debug)]
struct Handle(OwnedFd);

impl Handle {
    fn of(pid: u32) -> Result<Self> {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pid = pid.ok_or_else(|| failed("find its process")("no id"))?;
        let process = pidfd_open(pid, PidfdFlags::empty());
        Ok(Self(process.map_err(failed("find its process"))?))
    }
}

impl Kill for Handle {
    fn kill(&self) -> Result<()> {
        match pidfd_send_signal(&self.0, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(why) => Err(failed("kill it")(std::io::Error::from(why))),
        }
    }
}

/// What the thread of a machine says once it runs.
type Begun = Result<(u32, Monitor)>;

fn begin(origin: Origin, spec: &TemplateSpec, clone: CloneSpec) -> Result<Box<dyn Instance>> {
    let asked = Instant::now();
    let input = match clone.stdin {
        Stdin::Null => Vec::new(),
        Stdin::Bytes(bytes) => bytes,
        _ => {
            return Err(unsupported(
                "a standard input that is not known at the start",
            ));
        }
    };
    let output = match clone.stdout {
        Output::Capture => None,
        Output::Null => Some(None),
        Output::File(file) => Some(Some(File::from(file))),
        Output::Piped => return Err(unsupported("output by a pipe")),
    };
    if clone.limits.memory.is_some() || clone.limits.cpus.is_some() {
        return Err(Error::NoController {
            what: "memory or processors",
            why: "backend qemu enters no control group: give its process to a lease".to_owned(),
        });
    }
    let id = clone
        .id
        .unwrap_or_else(|| format!("{:016x}", fastrand::u64(..)));
    let mut seed = [0; 32];
    rustix::rand::getrandom(&mut seed[..], rustix::rand::GetRandomFlags::empty())
        .map_err(failed("draw entropy"))?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let lines = Identity {
        id: &id,
        seed,
        now: now.map_or(0, |now| now.as_secs()),
        args: clone.args.as_ref().unwrap_or(&spec.args),
        env: clone.env.as_ref().unwrap_or(&spec.env),
        cwd: clone.cwd.as_ref().unwrap_or(&spec.cwd),
        input: &input,
    }
    .lines();
    let shared = Arc::new(Shared::default());
    let (says, begun) = channel();
    let job = Job {
        origin,
        lines,
        output,
        most: clone.limits.output,
        run_time: clone.limits.run_time,
        shared: Arc::clone(&shared),
    };
    let thread = thread::Builder::new()
        .name("rund-qemu".to_owned())
        .spawn(move || job.run(&says))
        .map_err(failed("start its thread"))?;
    let (pid, monitor) = hear(&begun)?;
    let stats = Stats {
        backend: BACKEND.to_owned(),
        isolation: Some(isolation()),
        pid: Some(pid),
        start: asked.elapsed(),
        ..Stats::default()
    };
    Ok(Box::new(Clone {
        pid,
        kill: Arc::new(Handle::of(pid)?),
        monitor: Mutex::new(monitor),
        began: Instant::now(),
        stats,
        shared,
        thread: Some(thread),
    }))
}

fn hear(begun: &Receiver<Begun>) -> Begun {
    match begun.recv_timeout(START * 2) {
        Ok(begun) => begun,
        Err(why) => Err(failed("start")(why)),
    }
}

fn unsupported(what: &'static str) -> Error {
    Error::BadSetting {
        what,
        why: "backend qemu has one serial line".to_owned(),
    }
}

/// A machine's end, as its thread says it.
#[derive(Debug, Default)]
struct Shared {
    end: Mutex<Option<std::result::Result<Exit, String>>>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Option<std::result::Result<Exit, String>>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread of a machine does: it starts QEMU, and lives as long.
struct Job {
    origin: Origin,
    lines: Vec<u8>,
    output: Option<Option<File>>,
    most: ByteSize,
    run_time: Option<Duration>,
    shared: Arc<Shared>,
}

impl Job {
    fn run(mut self, says: &Sender<Begun>) {
        let end = match self.begin() {
            Ok((machine, monitor)) => {
                let _nobody_waits = says.send(Ok((machine.pid(), monitor)));
                self.see_through(machine).map_err(|why| why.to_string())
            }
            Err(why) => {
                let text = why.to_string();
                let _nobody_waits = says.send(Err(why));
                Err(text)
            }
        };
        *self.shared.lock() = Some(end);
        self.shared.changed.notify_all();
    }

    fn begin(&self) -> Result<(Machine, Monitor)> {
        let deadline = Instant::now() + START;
        let machine = match &self.origin {
            Origin::Template(saved) => {
                let mut machine =
                    Machine::start(&saved.shape, &saved.memory, Memory::Private, deadline)?;
                machine.restore(&saved.state, deadline)?;
                machine
            }
            Origin::Cold { shape, memory } => {
                Machine::start(shape, memory, Memory::Shared, deadline)?
            }
        };
        let monitor = machine.monitor()?;
        Ok((machine, monitor))
    }

    /// Tells the guest what it is, takes what it says, and waits for its end.
    fn see_through(&mut self, mut machine: Machine) -> Result<Exit> {
        let (Some(mut input), Some(mut output)) = (machine.input.take(), machine.output.take())
        else {
            return Err(failed("reach its console")("there is none"));
        };
        let time = match self.run_time {
            Some(time) => Some(Watchdog::start(machine.pid(), time)?),
            None => None,
        };
        if matches!(self.origin, Origin::Cold { .. }) {
            // A kernel that boots takes what comes too early for its own.
            read_until_ready(&mut output).map_err(|why| Error::NoSnapshot { why })?;
        }
        let mut transcript = Transcript::new(self.most);
        // A guest that does not read its input must not keep us from reading its output.
        let lines = std::mem::take(&mut self.lines);
        thread::scope(|scope| {
            scope.spawn(move || {
                let _guest_is_gone = input.write_all(&lines);
                // Kept open: the end of its console would be the end of QEMU's.
                drop(input);
            });
            let mut chunk = [0; CHUNK];
            while let Ok(n) = output.read(&mut chunk) {
                if n == 0 {
                    break;
                }
                transcript.push(&chunk[..n]);
            }
        });
        let signal = machine.wait()?;
        let (said, code, truncated) = transcript.finish();
        let timed_out = time.is_some_and(|time| time.has_fired());
        let status = match (code, signal) {
            (Some(code), _) => Status::Code(code),
            _ if timed_out => Status::TimedOut,
            (None, Some(signal)) => Status::Signal(signal),
            (None, None) => {
                return Err(Error::HelperGone {
                    what: "qemu",
                    why: "the guest went without a word".to_owned(),
                });
            }
        };
        let mut exit = Exit::new(status);
        exit.truncated = truncated;
        match &mut self.output {
            None => exit.stdout = said,
            Some(None) => {}
            Some(Some(file)) => file
                .write_all(&said)
                .map_err(failed("hand on its output"))?,
        }
        Ok(exit)
    }
}

/// A running clone.
#[derive(Debug)]
struct Clone {
    pid: u32,
    kill: Arc<Handle>,
    monitor: Mutex<Monitor>,
    began: Instant,
    stats: Stats,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl Clone {
    fn command(&self, command: &str) -> Result<()> {
        let mut monitor = self.monitor.lock().unwrap_or_else(PoisonError::into_inner);
        monitor.run(command, &json!({})).map(|_| ())
    }
}

impl Instance for Clone {
    fn wait(&self, deadline: Option<Duration>) -> Result<Exit> {
        let start = Instant::now();
        let mut end = self.shared.lock();
        loop {
            match &*end {
                Some(Ok(exit)) => {
                    let mut exit = exit.clone();
                    exit.stats = self.stats.clone();
                    exit.stats.run = self.began.elapsed();
                    return Ok(exit);
                }
                Some(Err(why)) => {
                    return Err(Error::HelperGone {
                        what: "qemu",
                        why: why.clone(),
                    });
                }
                None => {}
            }
            let left = deadline.map(|deadline| deadline.saturating_sub(start.elapsed()));
            end = match left {
                Some(left) if left.is_zero() => {
                    return Err(Error::DeadlineExceeded {
                        what: "the guest's end",
                        deadline: deadline.unwrap_or_default(),
                    });
                }
                Some(left) => {
                    let waited = self.shared.changed.wait_timeout(end, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                None => {
                    let waited = self.shared.changed.wait(end);
                    waited.unwrap_or_else(PoisonError::into_inner)
                }
            };
        }
    }

    fn kill_handle(&self) -> KillHandle {
        KillHandle::new(Arc::clone(&self.kill) as Arc<dyn Kill>)
    }

    fn stats(&self) -> Result<Stats> {
        let mut stats = self.stats.clone();
        stats.run = self.began.elapsed();
        let text = std::fs::read_to_string(format!("/proc/{}/smaps_rollup", self.pid));
        stats.pss = text.ok().and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("Pss:"))?;
            let kib = line.split_whitespace().nth(1)?.parse().ok()?;
            Some(ByteSize::kib(kib))
        });
        Ok(stats)
    }

    fn pid(&self) -> Option<u32> {
        Some(self.pid)
    }

    fn pause(&self) -> Result<()> {
        self.command("stop")
    }

    fn resume(&self) -> Result<()> {
        self.command("cont")
    }

    fn take_stdin(&self) -> Option<File> {
        None
    }

    fn take_stdout(&self) -> Option<File> {
        None
    }

    fn take_stderr(&self) -> Option<File> {
        None
    }
}

impl Drop for Clone {
    fn drop(&mut self) {
        let _gone = self.kill.kill();
        if let Some(thread) = self.thread.take() {
            let _panicked = thread.join();
        }
    }
}
