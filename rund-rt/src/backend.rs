//! What a backend is: something that makes templates and clones them.

use std::any::Any;
use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use carlsbad_types::ByteSize;
use serde::{Deserialize, Serialize};

use crate::cgroup::Usage;
use crate::error::{Error, Result};
use crate::rootfs::find_in_root;

/// What separates a sandbox from the host, weakest last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Isolation {
    /// A virtual machine by the processor's own means (VMX or SVM).
    HardwareVm,
    /// A virtual machine whose memory the host's kernel shadows, in software (a KVM of the PVM
    /// type, as inside a virtual machine that has no nested virtualisation).
    PvmVm,
    /// A virtual machine that a program emulates, instruction by instruction (QEMU's TCG).
    EmulatedVm,
    /// Namespaces and filters of one shared kernel: not a virtual machine.
    ProcessOnly,
}

impl Isolation {
    /// Whether an address space of its own lies around the sandbox.
    pub const fn is_vm(self) -> bool {
        !matches!(self, Self::ProcessOnly)
    }
}

impl fmt::Display for Isolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::HardwareVm => "hardware-vm",
            Self::PvmVm => "pvm-vm",
            Self::EmulatedVm => "emulated-vm",
            Self::ProcessOnly => "process-only",
        })
    }
}

/// What a backend found on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Capabilities {
    /// The backend.
    pub backend: &'static str,
    /// The isolation that its sandboxes get.
    pub isolation: Isolation,
    /// What else it found, for people: the kind of KVM, the version of QEMU.
    pub details: Vec<String>,
}

impl Capabilities {
    /// What a backend of this name gives.
    pub fn new(backend: &'static str, isolation: Isolation) -> Self {
        Self {
            backend,
            isolation,
            details: Vec::new(),
        }
    }
}

/// When a template is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SnapshotPoint {
    /// Before the program's first instruction. Each clone has arguments, an environment and
    /// random numbers of its own from the beginning.
    #[default]
    Entry,
    /// At the first system call whose answer differs between clones: a clock, entropy, an id, or
    /// standard input.
    FirstIdentity,
    /// When the program first reads standard input. What it drew of entropy before that is the
    /// same in every clone: [`Template::shared_draws`] counts it.
    FirstInput,
}

/// What a template is made of.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TemplateSpec {
    /// The program: a static Linux ELF (`kvm-elf`, `process`), or a kernel (`qemu`).
    pub program: PathBuf,
    /// Its initial file system (`qemu` only).
    pub initramfs: Option<PathBuf>,
    /// The program's path inside the sandbox; the host's where there is none.
    pub inside: Option<PathBuf>,
    /// Arguments, from `argv[0]` on. Clones of a template saved at its entry may have others.
    pub args: Vec<OsString>,
    /// The environment, as `NAME=value`.
    pub env: Vec<OsString>,
    /// The working directory inside the sandbox.
    pub cwd: PathBuf,
    /// What every clone sees as `/`, read-only: a directory, or an erofs image (`qemu`). Nothing is
    /// visible without it.
    pub root: Option<PathBuf>,
    /// The most memory that a guest can have: 8 MiB to 1 GiB (`kvm-elf`).
    pub memory: ByteSize,
    /// When it is saved.
    pub snapshot: SnapshotPoint,
    /// How long it may take to get there; a minute where nothing is said.
    pub deadline: Duration,
}

impl TemplateSpec {
    /// A template of `program`, saved at its entry, with 64 MiB.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        let program = program.into();
        Self {
            args: vec![program.clone().into_os_string()],
            program,
            inside: None,
            initramfs: None,
            env: Vec::new(),
            cwd: "/".into(),
            root: None,
            memory: ByteSize::mib(64),
            snapshot: SnapshotPoint::default(),
            deadline: Duration::from_secs(60),
        }
    }

    /// A template of the program at `inside` in `root`, which its clones see as `/`. Symbolic links
    /// on the way stay in the root, as for who is in the sandbox.
    ///
    /// # Errors
    /// [`Error::BadProgram`] where the root has no such file.
    pub fn in_root(root: impl Into<PathBuf>, inside: impl Into<PathBuf>) -> Result<Self> {
        let (root, inside) = (root.into(), inside.into());
        let program = find_in_root(&root, &inside).map_err(|why| Error::BadProgram {
            program: inside.display().to_string(),
            why: format!("in {}: {why}", root.display()),
        })?;
        let mut spec = Self::new(program).args([&inside]).root(root);
        spec.inside = Some(inside);
        Ok(spec)
    }

    /// The program's path inside the sandbox.
    pub fn path_inside(&self) -> &Path {
        self.inside.as_deref().unwrap_or(&self.program)
    }

    /// With these arguments, from `argv[0]` on.
    #[must_use]
    pub fn args<T: Into<OsString>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args = args.into_iter().map(Into::into).collect();
        self
    }

    /// With this environment, each as `NAME=value`.
    #[must_use]
    pub fn env<T: Into<OsString>>(mut self, env: impl IntoIterator<Item = T>) -> Self {
        self.env = env.into_iter().map(Into::into).collect();
        self
    }

    /// With this directory as `/`.
    #[must_use]
    pub fn root(mut self, root: impl Into<PathBuf>) -> Self {
        self.root = Some(root.into());
        self
    }

    /// With so much memory at most.
    #[must_use]
    pub fn memory(mut self, memory: ByteSize) -> Self {
        self.memory = memory;
        self
    }

    /// With this working directory.
    #[must_use]
    pub fn cwd(mut self, cwd: impl Into<PathBuf>) -> Self {
        self.cwd = cwd.into();
        self
    }

    /// With so much time to get to the point of the snapshot.
    #[must_use]
    pub const fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Saved at this point.
    #[must_use]
    pub fn snapshot(mut self, point: SnapshotPoint) -> Self {
        self.snapshot = point;
        self
    }
}

/// What a sandbox reads as its standard input.
#[derive(Debug, Default)]
#[non_exhaustive]
pub enum Stdin {
    /// Nothing.
    #[default]
    Null,
    /// These bytes.
    Bytes(Vec<u8>),
    /// What is written to [`Sandbox::take_stdin`](crate::Sandbox::take_stdin).
    Piped,
    /// An open file.
    File(OwnedFd),
}

/// Where a sandbox's standard output or error goes.
#[derive(Debug, Default)]
#[non_exhaustive]
pub enum Output {
    /// Into [`Exit::stdout`] or [`Exit::stderr`].
    #[default]
    Capture,
    /// Nowhere.
    Null,
    /// To [`Sandbox::take_stdout`](crate::Sandbox::take_stdout), while it runs.
    Piped,
    /// Into an open file.
    File(OwnedFd),
}

/// Whether virtual machine monitors serve more than one sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Reuse {
    /// The machine may have served before, and was set back to the template, all of it. It is set
    /// back again at the end.
    #[default]
    Reset,
    /// A new process and a new machine, which end with the sandbox.
    Fresh,
}

/// What a sandbox may use, with all its processes.
///
/// Memory and processors are limited by a control group, which the backend takes from the pool that
/// it was given; without one such a limit is refused.
///
/// ```no_run
/// # fn main() -> rund_rt::Result<()> {
/// use std::sync::Arc;
/// use rund_rt::cgroup::{CgroupPool, Hierarchy, PoolConfig};
/// use rund_rt::{ByteSize, CloneSpec, Limits, Runtime, TemplateSpec};
///
/// let pool = CgroupPool::new(Hierarchy::detect()?, PoolConfig::default())?;
/// let runtime = Runtime::builder().cgroups(Arc::new(pool)).build()?;
/// let template = runtime.prepare(&TemplateSpec::new("/srv/function"))?;
/// let limits = Limits::new().memory(ByteSize::mib(64)).cpus(0.5);
/// let exit = runtime.start(&template, CloneSpec::new().limits(limits))?.wait(None)?;
/// let usage = exit.stats.usage.unwrap_or_default();
/// println!("{:?} of a processor, {:?} at most", usage.cpu, usage.memory_peak);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Limits {
    /// Memory that it may dirty, enforced by a control group.
    pub memory: Option<ByteSize>,
    /// Processors, in units of one: 0.5 is half of one. Enforced by a control group.
    pub cpus: Option<f64>,
    /// Processes, the first one included; 64 where nothing is said (`kvm-elf`).
    pub processes: Option<u32>,
    /// Time from start to end; a sandbox that takes longer is killed.
    pub run_time: Option<Duration>,
    /// Bytes in its writable layer. A name counts 4 KiB beside what is in it, and a file without one
    /// counts for as long as it is open. With none there is no such layer, and the root is read-only.
    pub upper: ByteSize,
    /// Bytes of captured output; what comes behind them is dropped, and [`Exit::truncated`] says
    /// so.
    pub output: ByteSize,
}

impl Limits {
    /// The default: no more than 64 MiB in its writable layer, 16 MiB of captured output, and what
    /// its backend sets for processes.
    pub fn new() -> Self {
        Self::default()
    }

    /// With so much memory at most.
    #[must_use]
    pub const fn memory(mut self, memory: ByteSize) -> Self {
        self.memory = Some(memory);
        self
    }

    /// With so much of the processors: 0.5 is half of one.
    #[must_use]
    pub const fn cpus(mut self, cpus: f64) -> Self {
        self.cpus = Some(cpus);
        self
    }

    /// With so many processes at most.
    #[must_use]
    pub const fn processes(mut self, processes: u32) -> Self {
        self.processes = Some(processes);
        self
    }

    /// With so much time from start to end.
    #[must_use]
    pub const fn run_time(mut self, time: Duration) -> Self {
        self.run_time = Some(time);
        self
    }

    /// With so many bytes in its writable layer.
    #[must_use]
    pub const fn upper(mut self, upper: ByteSize) -> Self {
        self.upper = upper;
        self
    }

    /// With so many bytes of captured output.
    #[must_use]
    pub const fn output(mut self, output: ByteSize) -> Self {
        self.output = output;
        self
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory: None,
            cpus: None,
            processes: None,
            run_time: None,
            upper: ByteSize::mib(64),
            output: ByteSize::mib(16),
        }
    }
}

/// What a clone has of its own.
#[derive(Debug, Default)]
#[non_exhaustive]
pub struct CloneSpec {
    /// Its name, unique among the sandboxes alive of one [`Runtime`](crate::Runtime); drawn at
    /// random where there is none.
    pub id: Option<String>,
    /// Arguments instead of the template's (only where that was saved at its entry).
    pub args: Option<Vec<OsString>>,
    /// The environment instead of the template's (only where that was saved at its entry).
    pub env: Option<Vec<OsString>>,
    /// The working directory instead of the template's.
    pub cwd: Option<PathBuf>,
    /// The directory that is `/`, instead of the template's.
    pub root: Option<PathBuf>,
    /// Standard input.
    pub stdin: Stdin,
    /// Standard output.
    pub stdout: Output,
    /// Standard error.
    pub stderr: Output,
    /// What it may use.
    pub limits: Limits,
    /// What becomes of its machine.
    pub reuse: Reuse,
    /// Whether all of the machine is compared with the template after the reset. It reads every
    /// page: for tests.
    pub verify_reset: bool,
}

impl CloneSpec {
    /// The template's arguments and limits, no input, captured output.
    pub fn new() -> Self {
        Self::default()
    }
    /// With this name.
    #[must_use]
    pub fn id(mut self, id: impl Into<String>) -> Self {
        self.id = Some(id.into());
        self
    }
    /// With these arguments, from `argv[0]` on.
    #[must_use]
    pub fn args<T: Into<OsString>>(mut self, args: impl IntoIterator<Item = T>) -> Self {
        self.args = Some(args.into_iter().map(Into::into).collect());
        self
    }
    /// With this environment, each as `NAME=value`.
    #[must_use]
    pub fn env<T: Into<OsString>>(mut self, env: impl IntoIterator<Item = T>) -> Self {
        self.env = Some(env.into_iter().map(Into::into).collect());
        self
    }
    /// With this standard input.
    #[must_use]
    pub fn stdin(mut self, stdin: Stdin) -> Self {
        self.stdin = stdin;
        self
    }
    /// With this standard output.
    #[must_use]
    pub fn stdout(mut self, stdout: Output) -> Self {
        self.stdout = stdout;
        self
    }
    /// With this standard error.
    #[must_use]
    pub fn stderr(mut self, stderr: Output) -> Self {
        self.stderr = stderr;
        self
    }
    /// With these limits.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }
    /// With a comparison of the whole machine after the reset.
    #[must_use]
    pub fn verify_reset(mut self) -> Self {
        self.verify_reset = true;
        self
    }
    /// With a machine that is set back afterwards, or a new one.
    #[must_use]
    pub fn reuse(mut self, reuse: Reuse) -> Self {
        self.reuse = reuse;
        self
    }
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Status {
    /// By itself, with this code.
    Code(i32),
    /// By this signal: its own fault (a wild pointer is SIGSEGV), or another's will.
    Signal(i32),
    /// By the watchdog, because its time was over.
    TimedOut,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
            Self::TimedOut => f.write_str("its time over"),
        }
    }
}

impl Status {
    /// Whether it ended by itself with code 0.
    pub const fn success(self) -> bool {
        matches!(self, Self::Code(0))
    }

    /// As a shell says it: a signal is 128 more, a time that was over is 124.
    pub const fn shell_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
            Self::TimedOut => 124,
        }
    }
}

/// The end of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Exit {
    /// How its program ended.
    pub status: Status,
    /// What it wrote to standard output, where that was captured.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error, where that was captured.
    pub stderr: Vec<u8>,
    /// Whether output was dropped because there was more than [`Limits::output`].
    pub truncated: bool,
    /// What it used.
    pub stats: Stats,
}

impl Exit {
    /// An end without output.
    pub fn new(status: Status) -> Self {
        Self {
            status,
            stdout: Vec::new(),
            stderr: Vec::new(),
            truncated: false,
            stats: Stats::default(),
        }
    }
}

/// What a sandbox used, and what it was given.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Stats {
    /// The backend.
    pub backend: String,
    /// The isolation in force.
    pub isolation: Option<Isolation>,
    /// Whether it began as a clone of a template that was there already.
    pub template_hit: bool,
    /// Whether its machine had served before and was set back.
    pub recycled: bool,
    /// Whether its root is split into a shared read-only part and a writable one of its own.
    pub split_rootfs: bool,
    /// Whether its control group came from a pool.
    pub pooled_cgroup: bool,
    /// The process that holds the machine.
    pub pid: Option<u32>,
    /// From the request to the program's first instruction.
    pub start: Duration,
    /// From its first instruction to its end, or to now.
    pub run: Duration,
    /// From its end until its machine was the template again: in
    /// [`Sandbox::stats`](crate::Sandbox::stats) after the end, 0 before and with [`Reuse::Fresh`].
    pub reset: Duration,
    /// System calls that left the machine.
    pub exits: u64,
    /// System calls that were served inside it.
    pub served_inside: u64,
    /// Pages that differed from the template, known as [`reset`](Self::reset) is.
    pub dirty_pages: u64,
    /// PSS of its process, where it is alive.
    pub pss: Option<ByteSize>,
    /// What its control group has counted, where it has one.
    pub usage: Option<Usage>,
}

/// Ends a sandbox from anywhere, also while another thread waits for it.
#[derive(Debug, Clone)]
pub struct KillHandle(Arc<dyn Kill>);

impl KillHandle {
    /// A handle that a backend made.
    pub fn new(kill: Arc<dyn Kill>) -> Self {
        Self(kill)
    }

    /// Ends it with SIGKILL. One that has ended already is left in peace.
    ///
    /// # Errors
    /// Where the operating system refuses.
    pub fn kill(&self) -> Result<()> {
        self.0.kill()
    }
}

/// How a backend ends a sandbox.
pub trait Kill: Send + Sync + fmt::Debug {
    /// See [`KillHandle::kill`].
    ///
    /// # Errors
    /// Where the operating system refuses.
    fn kill(&self) -> Result<()>;
}

/// A program, or a machine, saved at a point from which clones go on.
#[derive(Debug, Clone)]
pub struct Template(Arc<dyn SavedState>);

impl Template {
    /// A template that a backend made.
    pub fn new(state: Arc<dyn SavedState>) -> Self {
        Self(state)
    }

    /// The backend that made it.
    pub fn backend(&self) -> &'static str {
        self.0.backend()
    }

    /// Bytes that are kept of it.
    pub fn size(&self) -> ByteSize {
        self.0.size()
    }

    /// How often the program asked for entropy, a clock or an id before it was saved: answers that
    /// all clones share.
    pub fn shared_draws(&self) -> u32 {
        self.0.shared_draws()
    }

    /// Writes it to a file, with a version and a checksum.
    ///
    /// # Errors
    /// Where the file cannot be written, or where the backend keeps no template on disk.
    pub fn save(&self, path: &Path) -> Result<()> {
        self.0.save(path)
    }

    /// What the backend keeps, for the backend.
    pub fn state<T: SavedState>(&self) -> Option<&T> {
        let any: &dyn Any = &*self.0;
        any.downcast_ref()
    }
}

/// What a backend keeps of a template.
pub trait SavedState: Any + Send + Sync + fmt::Debug {
    /// See [`Template::backend`].
    fn backend(&self) -> &'static str;
    /// See [`Template::size`].
    fn size(&self) -> ByteSize;
    /// See [`Template::shared_draws`].
    fn shared_draws(&self) -> u32 {
        0
    }
    /// See [`Template::save`].
    ///
    /// # Errors
    /// See [`Template::save`].
    fn save(&self, path: &Path) -> Result<()>;
}

/// A running clone, as a backend sees it.
pub trait Instance: Send + Sync + fmt::Debug {
    /// Waits for its end, or until `deadline` is over. After the end it gives the same answer
    /// again.
    ///
    /// # Errors
    /// [`DeadlineExceeded`](crate::Error::DeadlineExceeded), or where its process is gone.
    fn wait(&self, deadline: Option<Duration>) -> Result<Exit>;
    /// A handle that ends it.
    fn kill_handle(&self) -> KillHandle;
    /// What it has used until now.
    ///
    /// # Errors
    /// Where the operating system does not say.
    fn stats(&self) -> Result<Stats>;
    /// The process that holds it.
    fn pid(&self) -> Option<u32>;
    /// Stops it where it is.
    ///
    /// # Errors
    /// Where the operating system refuses.
    fn pause(&self) -> Result<()>;
    /// Lets it go on.
    ///
    /// # Errors
    /// Where the operating system refuses.
    fn resume(&self) -> Result<()>;
    /// The other end of a piped standard input, once.
    fn take_stdin(&self) -> Option<File>;
    /// The other end of a piped standard output, once.
    fn take_stdout(&self) -> Option<File>;
    /// The other end of a piped standard error, once.
    fn take_stderr(&self) -> Option<File>;
    /// After the end of a clone that asked for it: what of its machine differs from the template
    /// after the reset. `None` where it was not reset.
    fn reset_differences(&self) -> Option<Vec<String>> {
        None
    }
}

/// Something that makes templates and clones them.
pub trait Backend: Send + Sync + fmt::Debug {
    /// Its name: `kvm-elf`, `qemu` or `process`.
    fn name(&self) -> &'static str;
    /// What it finds here.
    ///
    /// # Errors
    /// [`Unavailable`](crate::Error::Unavailable) where it cannot work here.
    fn probe(&self) -> Result<Capabilities>;
    /// Runs a program to the point of the snapshot and saves it.
    ///
    /// # Errors
    /// Where the program cannot be run, or does not get there.
    fn build_template(&self, spec: &TemplateSpec) -> Result<Template>;
    /// Reads a template that [`Template::save`] wrote. Its clones see `root` as `/`.
    ///
    /// # Errors
    /// [`BadTemplate`](crate::Error::BadTemplate) where it is damaged or was made elsewhere.
    fn load_template(&self, path: &Path, root: Option<&Path>) -> Result<Template>;
    /// Makes clones ahead, so that so many starts find one waiting.
    ///
    /// # Errors
    /// Where one cannot be made.
    fn prewarm(&self, _template: &Template, _clones: usize) -> Result<()> {
        Ok(())
    }
    /// Starts a clone. It runs when this returns, or is about to.
    ///
    /// # Errors
    /// Where it cannot be started.
    fn clone_from(&self, template: &Template, spec: CloneSpec) -> Result<Box<dyn Instance>>;
}
