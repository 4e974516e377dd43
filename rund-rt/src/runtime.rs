//! The front door: a backend, and the sandboxes that it runs.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::{Backend, Capabilities, CloneSpec, Isolation, Template, TemplateSpec};
use crate::cgroup::CgroupPool;
use crate::error::{Error, Result};
use crate::sandbox::Sandbox;

/// Makes a [`Runtime`].
#[derive(Debug, Default)]
pub struct RuntimeBuilder {
    backend: Option<Box<dyn Backend>>,
    helper: Option<PathBuf>,
    cgroups: Option<Arc<CgroupPool>>,
    least: Option<Isolation>,
}

impl RuntimeBuilder {
    /// With this backend instead of the default.
    #[must_use]
    pub fn backend(mut self, backend: impl Backend + 'static) -> Self {
        self.backend = Some(Box::new(backend));
        self
    }

    /// With helper processes that are `program`, whose `main` calls [`init`](crate::init), instead
    /// of this program.
    #[must_use]
    pub fn helper(mut self, program: impl Into<PathBuf>) -> Self {
        self.helper = Some(program.into());
        self
    }

    /// With a control group from `pool` for each sandbox of the default backend. Another backend
    /// is given its pool itself.
    #[must_use]
    pub fn cgroups(mut self, pool: Arc<CgroupPool>) -> Self {
        self.cgroups = Some(pool);
        self
    }

    /// Refuses where the isolation is not a virtual machine's.
    #[must_use]
    pub fn require_vm(mut self) -> Self {
        self.least = Some(Isolation::EmulatedVm);
        self
    }

    /// Probes the backend.
    ///
    /// # Errors
    /// [`Error::Unavailable`] where it cannot work here, [`Error::TooLittleIsolation`].
    pub fn build(self) -> Result<Runtime> {
        let backend = match self.backend {
            Some(backend) => backend,
            None => default_backend(self.helper, self.cgroups)?,
        };
        let capabilities = backend.probe()?;
        if let Some(wanted) = self.least
            && !capabilities.isolation.is_vm()
        {
            return Err(Error::TooLittleIsolation {
                backend: capabilities.backend,
                wanted,
                given: capabilities.isolation,
            });
        }
        Ok(Runtime {
            backend,
            capabilities,
            alive: Arc::default(),
        })
    }
}

#[cfg(target_arch = "x86_64")]
fn default_backend(
    helper: Option<PathBuf>,
    cgroups: Option<Arc<CgroupPool>>,
) -> Result<Box<dyn Backend>> {
    let mut backend = crate::kvm_elf::KvmElf::new();
    if let Some(helper) = helper {
        backend = backend.helper(helper);
    }
    if let Some(pool) = cgroups {
        backend = backend.cgroups(pool);
    }
    Ok(Box::new(backend))
}

#[cfg(not(target_arch = "x86_64"))]
fn default_backend(
    _helper: Option<PathBuf>,
    _cgroups: Option<Arc<CgroupPool>>,
) -> Result<Box<dyn Backend>> {
    Err(Error::Unavailable {
        backend: "kvm-elf",
        why: "it is for x86-64".into(),
        fix: "use backend `process` or `qemu`",
    })
}

/// Names of the sandboxes alive.
pub(crate) type Alive = Arc<Mutex<HashSet<String>>>;

/// A backend, and the sandboxes that it runs.
#[derive(Debug)]
pub struct Runtime {
    backend: Box<dyn Backend>,
    capabilities: Capabilities,
    alive: Alive,
}

impl Runtime {
    /// A runtime with `kvm-elf`, unless it is told otherwise.
    pub fn builder() -> RuntimeBuilder {
        RuntimeBuilder::default()
    }

    /// What the backend found here, and the isolation in force.
    pub const fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    /// Runs a program to the point of the snapshot and saves it.
    ///
    /// # Errors
    /// [`Error::BadProgram`], [`Error::NoSnapshot`].
    pub fn prepare(&self, spec: &TemplateSpec) -> Result<Template> {
        self.backend.build_template(spec)
    }

    /// Reads a template that [`Template::save`] wrote. Its clones see `root` as `/`.
    ///
    /// # Errors
    /// [`Error::BadTemplate`] where it is damaged, or of another version or processor.
    pub fn load(&self, path: &Path, root: Option<&Path>) -> Result<Template> {
        self.backend.load_template(path, root)
    }

    /// Makes clones ahead, so that so many starts find one waiting.
    ///
    /// # Errors
    /// Where one cannot be made.
    pub fn prewarm(&self, template: &Template, clones: usize) -> Result<()> {
        self.backend.prewarm(template, clones)
    }

    /// Starts a clone. It runs when this returns, or is about to.
    ///
    /// # Errors
    /// [`Error::DuplicateId`], [`Error::BadSetting`], or where no process can be had.
    pub fn start(&self, template: &Template, mut spec: CloneSpec) -> Result<Sandbox> {
        let id = spec.id.take().unwrap_or_else(random_id);
        let name = Name::take(&self.alive, id)?;
        spec.id = Some(name.id.clone());
        let instance = self.backend.clone_from(template, spec)?;
        Ok(Sandbox::new(name, instance))
    }

    /// Starts many clones, one after the other; they run side by side.
    pub fn start_many(
        &self,
        template: &Template,
        specs: impl IntoIterator<Item = CloneSpec>,
    ) -> Vec<Result<Sandbox>> {
        specs
            .into_iter()
            .map(|spec| self.start(template, spec))
            .collect()
    }
}

fn random_id() -> String {
    let mut bytes = [0u8; 8];
    // SAFETY: a buffer with its length.
    let _short_never = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    format!("rund-{:016x}", u64::from_le_bytes(bytes))
}

/// A sandbox's name, taken for its life.
#[derive(Debug)]
pub(crate) struct Name {
    pub(crate) id: String,
    alive: Alive,
}

impl Name {
    fn take(alive: &Alive, id: String) -> Result<Self> {
        let mut names = alive.lock().unwrap_or_else(PoisonError::into_inner);
        if !names.insert(id.clone()) {
            return Err(Error::DuplicateId { id });
        }
        Ok(Self {
            id,
            alive: Arc::clone(alive),
        })
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        let mut names = self.alive.lock().unwrap_or_else(PoisonError::into_inner);
        names.remove(&self.id);
    }
}
