//! The backend `process`: namespaces, a list of system calls and Landlock around an ordinary
//! process. It is **not** a virtual machine: one kernel serves all, and an error in it is shared by
//! all. It is for machines without `/dev/kvm`, and for measuring what a machine costs.
//!
//! A template is a parsed specification, the program's open file, and a mounted image; a clone is
//! one process, started by a helper that is this program again ([`init`](crate::init)).

mod confine;
mod helper;
mod instance;
mod plan;
mod spawn;

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use carlsbad_types::ByteSize;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags, memfd_create, open};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::backend::{
    Backend, Capabilities, CloneSpec, Instance, Isolation, Output, SavedState, Stats, Stdin,
    Template, TemplateSpec,
};
use crate::cgroup::{CgroupLease, CgroupPool};
use crate::error::{Error, Result};
use crate::rootfs::{Image, Lower, Rootfs, RootfsStore};
use instance::{Captured, Process};
use plan::{BEGIN, NAME, Plan, Root};

/// What this backend is called.
const BACKEND: &str = "process";
/// How every ELF file begins.
const ELF: &[u8; 4] = b"\x7fELF";
/// Longer host names are cut (linux/utsname.h).
const HOST_NAME: usize = 64;
/// How long a helper may take to build a sandbox.
const START: Duration = Duration::from_secs(30);

/// Where this process was started as this backend's helper, is the helper and does not return.
pub(crate) fn helper_or_return() {
    if std::env::args_os().next().is_some_and(|name| name == NAME) {
        helper::main();
    }
}

/// Sandboxes that are processes: [`Isolation::ProcessOnly`].
///
/// As root, with [`rootfs`](Self::rootfs), each clone of a template with a root has a split root
/// file system; else it sees the template's directory read-only. With
/// [`cgroups`](Self::cgroups) each clone leases a control group, and its limits of memory,
/// processors and processes can be met; else a clone with such limits is refused.
#[derive(Debug, Clone, Default)]
pub struct ProcessBackend {
    rootfs: Option<RootfsStore>,
    cgroups: Option<Arc<CgroupPool>>,
    helper: Option<PathBuf>,
}

impl ProcessBackend {
    /// Without split roots and control groups.
    pub fn new() -> Self {
        Self::default()
    }

    /// With helper processes that are `program`, whose `main` calls [`init`](crate::init).
    #[must_use]
    pub fn helper(mut self, program: impl Into<PathBuf>) -> Self {
        self.helper = Some(program.into());
        self
    }

    /// With root file systems split by `store`.
    #[must_use]
    pub fn rootfs(mut self, store: RootfsStore) -> Self {
        self.rootfs = Some(store);
        self
    }

    /// With control groups from `pool`.
    #[must_use]
    pub fn cgroups(mut self, pool: Arc<CgroupPool>) -> Self {
        self.cgroups = Some(pool);
        self
    }
}

/// What is kept of a template.
#[derive(Debug)]
struct Prepared {
    spec: TemplateSpec,
    program: OwnedFd,
    size: ByteSize,
    lower: Option<Lower>,
}

impl SavedState for Prepared {
    fn backend(&self) -> &'static str {
        BACKEND
    }

    fn size(&self) -> ByteSize {
        self.size
    }

    fn save(&self, path: &Path) -> Result<()> {
        Err(Error::BadSetting {
            what: "saving a template",
            why: format!(
                "backend {BACKEND} keeps no memory of a program, so that there is nothing to write \
                 to {}",
                path.display()
            ),
        })
    }
}

impl Backend for ProcessBackend {
    fn name(&self) -> &'static str {
        BACKEND
    }

    fn probe(&self) -> Result<Capabilities> {
        let mut found = Capabilities::new(BACKEND, Isolation::ProcessOnly);
        confine::seccomp().map_err(|why| Error::Unavailable {
            backend: BACKEND,
            why,
            fix: "run it on x86-64, aarch64 or riscv64",
        })?;
        let root = rustix::process::geteuid().is_root();
        found.details.push("not a virtual machine".to_owned());
        found.details.push(
            if root {
                "namespaces, without capabilities"
            } else {
                "a user namespace"
            }
            .to_owned(),
        );
        if let Some(pool) = &self.cgroups {
            let version = pool.hierarchy().version();
            found.details.push(format!("control groups {version}"));
        }
        Ok(found)
    }

    fn build_template(&self, spec: &TemplateSpec) -> Result<Template> {
        let (program, size) = open_program(&spec.program)?;
        let lower = match (&self.rootfs, &spec.root) {
            (Some(store), Some(root)) => Some(store.lower(&Image::directory(root)?)?),
            _ => None,
        };
        Ok(Template::new(Arc::new(Prepared {
            spec: spec.clone(),
            program,
            size,
            lower,
        })))
    }

    fn load_template(&self, path: &Path, _root: Option<&Path>) -> Result<Template> {
        Err(Error::BadTemplate {
            path: path.to_owned(),
            why: format!("backend {BACKEND} keeps no templates on disk"),
        })
    }

    fn clone_from(&self, template: &Template, spec: CloneSpec) -> Result<Box<dyn Instance>> {
        let asked = Instant::now();
        let helper = crate::init::program(self.helper.as_deref())?;
        let Some(prepared) = template.state::<Prepared>() else {
            return Err(Error::ForeignTemplate {
                built_by: template.backend(),
                backend: BACKEND,
            });
        };
        let id = spec
            .id
            .clone()
            .unwrap_or_else(|| format!("{:016x}", fastrand::u64(..)));
        let lease = self.lease(&id, &spec)?;
        let place = self.place(prepared, &spec)?;
        let pipes = Pipes::new(&spec)?;
        let plan = Plan {
            root: place.root,
            args: bytes_of(spec.args.as_ref().unwrap_or(&prepared.spec.args)),
            env: bytes_of(spec.env.as_ref().unwrap_or(&prepared.spec.env)),
            cwd: {
                let cwd = spec.cwd.as_ref().unwrap_or(&prepared.spec.cwd);
                cwd.as_os_str().as_bytes().to_vec()
            },
            hostname: id.chars().take(HOST_NAME).collect(),
            capture: pipes.capture,
            output_bytes: spec.limits.output.get(),
            run_time_ms: spec
                .limits
                .run_time
                .map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
            user: user(),
        };
        let mut stdio = Stdio::new(spec, &pipes)?;
        let mut ready = start(
            &helper,
            &plan,
            prepared,
            &place,
            &pipes,
            &stdio,
            lease.as_ref(),
        )?;
        let mut process = Process::new(
            ready.started,
            ready.status,
            stdio.ours(),
            Captured::new(pipes.captured),
        );
        // Everything from here on ends the helper on the way out.
        let mut said = String::new();
        let told = ready.pipe.read_to_string(&mut said);
        told.map_err(Error::io("hear from", "the helper"))?;
        if !said.is_empty() {
            return Err(Error::Refused(format!("sandbox {id}: {said}")));
        }
        process.began(
            Stats {
                backend: BACKEND.to_owned(),
                isolation: Some(Isolation::ProcessOnly),
                template_hit: true,
                split_rootfs: place.split.is_some(),
                pooled_cgroup: lease.is_some(),
                pid: Some(process.pid()),
                start: asked.elapsed(),
                ..Stats::default()
            },
            lease,
            place.split,
        );
        Ok(Box::new(process))
    }
}

/// The directory that becomes `/`.
struct Place {
    root: Root,
    mount: OwnedFd,
    /// Where it is one of its own, made for this sandbox.
    split: Option<Rootfs>,
}

impl ProcessBackend {
    fn lease(&self, id: &str, spec: &CloneSpec) -> Result<Option<CgroupLease>> {
        let limits = &spec.limits;
        if let Some(pool) = &self.cgroups {
            return pool.lease_as(id, limits, START).map(Some);
        }
        let asked = [
            (limits.memory.is_some(), "memory"),
            (limits.cpus.is_some(), "processors"),
            (limits.processes.is_some(), "processes"),
        ];
        match asked.into_iter().find(|(asked, _)| *asked) {
            None => Ok(None),
            Some((_, what)) => Err(Error::NoController {
                what,
                why: "the backend has no pool of control groups; give it one by `cgroups`"
                    .to_owned(),
            }),
        }
    }

    fn place(&self, prepared: &Prepared, spec: &CloneSpec) -> Result<Place> {
        if let Some(own) = &spec.root {
            return Ok(Place {
                root: Root::Writable,
                mount: tree(own, true)?,
                split: None,
            });
        }
        if let (Some(store), Some(lower)) = (&self.rootfs, &prepared.lower) {
            let split = store.split_sized(lower, spec.limits.upper)?;
            return Ok(Place {
                root: Root::Writable,
                mount: split.mount_again()?,
                split: Some(split),
            });
        }
        let (root, mount) = match &prepared.spec.root {
            Some(root) => (Root::ReadOnly, tree(root, false)?),
            None => (Root::Empty, null(OFlags::RDONLY)?),
        };
        Ok(Place {
            root,
            mount,
            split: None,
        })
    }
}

/// The directory at `path`: as a mount of its own where this process may make one, else as it is.
fn tree(path: &Path, with_mounts_below: bool) -> Result<OwnedFd> {
    use rustix::mount::{OpenTreeFlags, open_tree};

    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if with_mounts_below {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let cloned = if rustix::process::geteuid().is_root() {
        open_tree(CWD, path, flags).ok()
    } else {
        None
    };
    let found = match cloned {
        Some(tree) => Ok(tree),
        None => open(
            path,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        ),
    };
    found.map_err(|why| Error::io("open the root", path)(why.into()))
}

/// User and group, where a user namespace has to stand in for rights.
fn user() -> Option<(u32, u32)> {
    let user = rustix::process::geteuid();
    let group = rustix::process::getegid();
    (!user.is_root()).then(|| (user.as_raw(), group.as_raw()))
}

fn bytes_of(texts: &[OsString]) -> Vec<Vec<u8>> {
    texts.iter().map(|text| text.as_bytes().to_vec()).collect()
}

fn null(flags: OFlags) -> Result<OwnedFd> {
    let opened = open("/dev/null", flags | OFlags::CLOEXEC, Mode::empty());
    opened.map_err(|why| Error::io("open", "/dev/null")(why.into()))
}

fn open_program(path: &Path) -> Result<(OwnedFd, ByteSize)> {
    let bad = |why: &str| Error::BadProgram {
        program: path.display().to_string(),
        why: why.to_owned(),
    };
    let mut file = File::open(path).map_err(|why| bad(&why.to_string()))?;
    let mut magic = [0; ELF.len()];
    match file.read_exact(&mut magic) {
        Ok(()) if magic == *ELF => {}
        Ok(()) => return Err(bad("it is no ELF file; name the interpreter of a script")),
        Err(why) if why.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(bad("it is shorter than an ELF header"));
        }
        Err(why) => return Err(Error::io("read", path)(why)),
    }
    let size = file.metadata().map_err(Error::io("stat", path))?.len();
    Ok((file.into(), ByteSize::new(size)))
}

/// What is captured, and where to.
struct Pipes {
    capture: [bool; 2],
    captured: [Option<OwnedFd>; 2],
}

impl Pipes {
    fn new(spec: &CloneSpec) -> Result<Self> {
        let capture = [&spec.stdout, &spec.stderr].map(|to| matches!(to, Output::Capture));
        let memory = |wanted: bool| {
            wanted
                .then(|| memfd_create("rund-output", MemfdFlags::CLOEXEC))
                .transpose()
                .map_err(|why| Error::io("make", "a memfd for output")(why.into()))
        };
        Ok(Self {
            capture,
            captured: [memory(capture[0])?, memory(capture[1])?],
        })
    }
}

/// Standard input, output and error: the sandbox's ends, and ours where they are piped.
struct Stdio {
    theirs: [OwnedFd; 3],
    ours: [Option<File>; 3],
}

impl Stdio {
    fn new(spec: CloneSpec, _pipes: &Pipes) -> Result<Self> {
        let pipe =
            || pipe_with(PipeFlags::CLOEXEC).map_err(|why| Error::io("make", "a pipe")(why.into()));
        let (stdin, our_in) = match spec.stdin {
            Stdin::Null => (null(OFlags::RDONLY)?, None),
            Stdin::File(file) => (file, None),
            Stdin::Piped => {
                let (reader, writer) = pipe()?;
                (reader, Some(File::from(writer)))
            }
            Stdin::Bytes(bytes) => (memory_file(&bytes)?, None),
        };
        let output = |to: Output| -> Result<(OwnedFd, Option<File>)> {
            Ok(match to {
                // Captured: by the helper, from a pipe of its own.
                Output::Capture | Output::Null => (null(OFlags::WRONLY)?, None),
                Output::File(file) => (file, None),
                Output::Piped => {
                    let (reader, writer) = pipe()?;
                    (writer, Some(File::from(reader)))
                }
            })
        };
        let (stdout, our_out) = output(spec.stdout)?;
        let (stderr, our_err) = output(spec.stderr)?;
        Ok(Self {
            theirs: [stdin, stdout, stderr],
            ours: [our_in, our_out, our_err],
        })
    }

    fn ours(&mut self) -> [Option<File>; 3] {
        std::mem::take(&mut self.ours)
    }
}

/// Bytes as a file that is read from its beginning.
fn memory_file(bytes: &[u8]) -> Result<OwnedFd> {
    use std::io::{Seek, Write};

    let failed = || Error::io("fill", "a memfd");
    let memory = memfd_create("rund-input", MemfdFlags::CLOEXEC);
    let mut file = File::from(memory.map_err(|why| failed()(why.into()))?);
    file.write_all(bytes).map_err(failed())?;
    file.rewind().map_err(failed())?;
    Ok(file.into())
}

struct Ready {
    started: spawn::Started,
    /// Says what went wrong, or nothing once the program runs.
    pipe: File,
    status: OwnedFd,
}

fn start(
    helper: &Path,
    plan: &Plan,
    prepared: &Prepared,
    place: &Place,
    pipes: &Pipes,
    stdio: &Stdio,
    lease: Option<&CgroupLease>,
) -> Result<Ready> {
    let failed = || Error::io("start", "the helper");
    let bytes = postcard::to_allocvec(plan).map_err(|why| Error::Refused(why.to_string()))?;
    let plan_file = memory_file(&bytes)?;
    let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|why| failed()(why.into()));
    let (ready, ready_theirs) = pipe()?;
    let (status, status_theirs) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )
    .map_err(|why| failed()(why.into()))?;
    let nothing = null(OFlags::WRONLY)?;
    let captured = |stream: usize| pipes.captured[stream].as_ref().unwrap_or(&nothing).as_fd();
    // In the order of their numbers (`plan`).
    let descriptors = [
        stdio.theirs[0].as_fd(),
        stdio.theirs[1].as_fd(),
        stdio.theirs[2].as_fd(),
        plan_file.as_fd(),
        ready_theirs.as_fd(),
        status_theirs.as_fd(),
        prepared.program.as_fd(),
        place.mount.as_fd(),
        captured(0),
        captured(1),
    ];
    let group = lease.and_then(CgroupLease::descriptor);
    let text = |bytes: &[u8]| {
        CString::new(bytes).map_err(|_| failed()(io::ErrorKind::InvalidInput.into()))
    };
    let (program, name) = (text(helper.as_os_str().as_bytes())?, text(NAME.as_bytes())?);
    let contained = plan.user.is_none();
    let started = spawn::start_again(&program, &name, &descriptors, contained, group);
    let started = started.map_err(failed())?;
    let joined = match (lease, group) {
        (Some(lease), None) => lease.add(started.pid.as_raw_nonzero().get().unsigned_abs()),
        _ => Ok(()),
    };
    // Where this fails the helper sees the socket's end, and ends.
    let begun = joined.and_then(|()| {
        let written = nix::unistd::write(&status, &[BEGIN]);
        written.map_err(|why| failed()(why.into()))
    });
    if let Err(why) = begun {
        drop(status);
        started.reap();
        return Err(why);
    }
    Ok(Ready {
        started,
        pipe: ready.into(),
        status,
    })
}
