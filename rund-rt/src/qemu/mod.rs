//! The backend `qemu`: a real Linux guest in a QEMU microvm, cloned from a template that was saved
//! when it had booted.
//!
//! The template's memory is a memfd that the first machine wrote. Every clone maps it privately, so
//! that its pages are shared until they are written; the device state is read from a second memfd.
//! Where the processor has VMX or SVM, and `/dev/kvm` can be opened, the machine is a hardware
//! one; else QEMU emulates it.

mod agent;
mod clone;
mod guest;
mod held;
mod job;
mod machine;
mod private_pages;
mod watchdog;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use carlsbad_types::ByteSize;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

use crate::backend::{
    Backend, Capabilities, CloneSpec, Instance, Isolation, SavedState, Template, TemplateSpec,
};
use crate::error::{Error, Result};
use crate::rootfs::{Format, Image};
use clone::begin;
use guest::read_until_ready;
use held::{Held, Pool};
use job::Origin;
use machine::{Machine, Shape, Start, failed};
use watchdog::Watchdog;

pub use guest::initramfs;

/// What this backend is called.
const BACKEND: &str = "qemu";
const PROGRAM: &str = "qemu-system-x86_64";
/// What a guest's memory is called among the mappings of its process.
const MEMORY_NAME: &str = "rund-qemu";
/// How long a kernel that is ready is left alone before it is saved. What it had put off (memory
/// that is freed behind a grace period, work that was delayed) every clone would do again.
const QUIET: Duration = Duration::from_millis(200);
/// How long a clone may take to be there.
const START: Duration = Duration::from_secs(60);

/// Sandboxes that are Linux guests of QEMU: [`Isolation::HardwareVm`] or
/// [`Isolation::EmulatedVm`].
///
/// A template is a kernel ([`TemplateSpec::program`]) and an initial file system
/// ([`TemplateSpec::initramfs`], see [`initramfs`](crate::qemu_initramfs)). A clone's arguments are
/// a command in the guest. Its standard output and error come over one serial line, both as
/// [`Exit::stdout`](crate::Exit::stdout).
///
/// Where [`TemplateSpec::root`] is an erofs image ([`rootfs::Image`](crate::rootfs::Image)), the
/// guest's root is split: the image on a read-only disk that all clones have in common, in the host's
/// page cache once, and over it a layer in each guest's own memory, which goes with it. Nobody may
/// write to the image while the template lives. The condensed kernel of `cargo xtask rund-kernel`
/// has what that needs built in; a distribution's usually has it in modules, which are not loaded.
///
/// Each clone has a thread, `rund-qemu`, which is joined when the clone is dropped; one that was made
/// ahead ([`Backend::prewarm`]) has it until then, or until the template is dropped.
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
            root: spec.root.as_deref().map(image).transpose()?,
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

/// The image that is a guest's read-only half.
fn image(path: &Path) -> Result<Arc<File>> {
    let image = Image::open(path)?;
    if image.format() != Format::Erofs {
        return Err(Error::Rootfs {
            path: path.to_owned(),
            why: "a guest of QEMU mounts an erofs image: rootfs::Image::build makes one".to_owned(),
        });
    }
    let file = File::open(image.path()).map_err(Error::io("open", path))?;
    Ok(Arc::new(file))
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
    let file = memfd_create(MEMORY_NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
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
    /// Clones that were made ahead.
    held: Pool,
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
        let mut machine = Machine::start(&shape, &memory, Start::Boot, deadline)?;
        let output = machine.output.take();
        // A guest that never gets there would be waited for for ever.
        let watchdog = Watchdog::start(machine.pid(), spec.deadline)?;
        let reached = output.map(read_until_ready);
        if matches!(reached, Some(Ok(()))) {
            thread::sleep(QUIET);
        }
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
            held: Pool::default(),
        })))))
    }

    fn load_template(&self, path: &Path, _root: Option<&Path>) -> Result<Template> {
        Err(Error::BadTemplate {
            path: path.to_owned(),
            why: format!("backend {BACKEND} keeps no templates on disk"),
        })
    }

    fn prewarm(&self, template: &Template, clones: usize) -> Result<()> {
        let Some(Kept(saved)) = template.state::<Kept>() else {
            return Err(Error::ForeignTemplate {
                built_by: template.backend(),
                backend: BACKEND,
            });
        };
        while saved.held.len() < clones {
            saved.held.add(Held::make(saved)?);
        }
        Ok(())
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
