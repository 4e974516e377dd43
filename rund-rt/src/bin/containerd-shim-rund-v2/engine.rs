//! What all containers share: the backend, templates, control groups, and the store of root file
//! systems.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use carlsbad_types::ByteSize;
use rund_rt::cgroup::{CgroupLease, CgroupPool, Hierarchy, PoolConfig};
use rund_rt::rootfs::{Image, Rootfs, RootfsConfig, RootfsStore};
use rund_rt::{
    Backend, CloneSpec, Instance, Isolation, Limits, ProcessBackend, Template, TemplateSpec,
};
use serde::Serialize;

/// The variable of containerd's environment that chooses the backend.
const BACKEND_VARIABLE: &str = "RUND_SHIM_BACKEND";
/// The annotation that chooses it for one container.
pub(crate) const BACKEND_ANNOTATION: &str = "io.containerd.rund.backend";
/// The variable that says where templates are kept.
const TEMPLATES_VARIABLE: &str = "RUND_SHIM_TEMPLATES";
const TEMPLATES: &str = "/run/rund-rt/templates";
/// Groups that wait for a container.
const READY: usize = 8;

/// What a container was given: `rund.json`.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct InForce {
    pub(crate) backend: &'static str,
    pub(crate) isolation: Isolation,
    pub(crate) template_hit: bool,
    pub(crate) split_rootfs: bool,
    pub(crate) pooled_cgroup: bool,
}

/// What all containers share.
#[derive(Debug)]
pub(crate) struct Engine {
    store: RootfsStore,
    pool: Arc<CgroupPool>,
    process: ProcessBackend,
    /// Programs that were prepared, by backend and content.
    known: Mutex<HashMap<String, Template>>,
    templates: PathBuf,
}

/// A sandbox with all that goes away with it.
#[derive(Debug)]
pub(crate) struct Started {
    // In this order: the group goes when the sandbox is gone.
    pub(crate) instance: Box<dyn Instance>,
    pub(crate) lease: Option<CgroupLease>,
    pub(crate) in_force: InForce,
}

impl Engine {
    pub(crate) fn new() -> Result<Self> {
        let mut config = PoolConfig::default();
        config.name = "shim".to_owned();
        config.ready = READY;
        let hierarchy = Hierarchy::detect().context("control groups")?;
        let pool = Arc::new(CgroupPool::new(hierarchy, config).context("control groups")?);
        let store = RootfsStore::open(&RootfsConfig::default()).context("root file systems")?;
        let templates = std::env::var_os(TEMPLATES_VARIABLE);
        Ok(Self {
            store,
            process: ProcessBackend::new().cgroups(Arc::clone(&pool)),
            pool,
            known: Mutex::default(),
            templates: templates.map_or_else(|| TEMPLATES.into(), PathBuf::from),
        })
    }

    /// The backend that a container asks for, or else the machine's setting, or else `kvm-elf`.
    /// Never another one than was asked for.
    pub(crate) fn backend(&self, annotation: Option<&str>) -> Result<&'static str> {
        let setting = std::env::var(BACKEND_VARIABLE).ok();
        match annotation.or(setting.as_deref()).unwrap_or("kvm-elf") {
            "process" => Ok("process"),
            "kvm-elf" => Ok("kvm-elf"),
            other => bail!("no backend is called `{other}`: `kvm-elf` or `process`"),
        }
    }

    /// A writable root of a container's own over the bundle's.
    pub(crate) fn split(&self, root: &Path, size: ByteSize) -> Result<Rootfs> {
        let lower = self.store.lower(&Image::directory(root)?)?;
        Ok(self.store.split_sized(&lower, size)?)
    }

    /// Starts a program over a split root.
    pub(crate) fn start(
        &self,
        backend: &'static str,
        template: &TemplateSpec,
        mut clone: CloneSpec,
        root: &Rootfs,
    ) -> Result<Started> {
        if backend == "kvm-elf" {
            return self.start_kvm(template, clone);
        }
        let (known, template_hit) = self.prepared(backend, template, |template| {
            let mut rootless = template.clone();
            rootless.root = None;
            Ok(self.process.build_template(&rootless)?)
        })?;
        clone.root = Some(root.path());
        let instance = self.process.clone_from(&known, clone)?;
        Ok(Started {
            instance,
            lease: None,
            in_force: InForce {
                backend,
                isolation: Isolation::ProcessOnly,
                template_hit,
                split_rootfs: true,
                pooled_cgroup: true,
            },
        })
    }

    /// A program's template, made or found.
    fn prepared(
        &self,
        backend: &str,
        spec: &TemplateSpec,
        make: impl FnOnce(&TemplateSpec) -> Result<Template>,
    ) -> Result<(Template, bool)> {
        let key = format!("{backend}-{}", digest(&spec.program)?);
        let known = &self.known;
        if let Some(template) = known
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
        {
            return Ok((template.clone(), true));
        }
        let made = make(spec)?;
        let mut known = known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(key, made.clone());
        Ok((made, false))
    }

    #[cfg(target_arch = "x86_64")]
    fn start_kvm(&self, spec: &TemplateSpec, clone: CloneSpec) -> Result<Started> {
        let backend = rund_rt::KvmElf::new();
        let name = format!("{}.rund", digest(&spec.program)?);
        let saved = self.templates.join(name);
        let root = spec.root.as_deref();
        // A container's root is its own, its program's memory is everybody's: so the template is
        // kept in a file, which each container maps with its root.
        let (template, template_hit) = match backend.load_template(&saved, root) {
            Ok(template) => (template, true),
            Err(_) => {
                let made = backend.build_template(spec)?;
                std::fs::create_dir_all(&self.templates).context("make the template folder")?;
                if let Err(why) = made.save(&saved) {
                    tracing::warn!(%why, "the template is not kept");
                }
                (made, false)
            }
        };
        let id = clone.id.clone().unwrap_or_default();
        let limits = clone.limits.clone();
        let lease = self.lease(&id, &limits)?;
        let instance = backend.clone_from(&template, clone)?;
        if let Some(pid) = instance.pid() {
            lease.add(pid)?;
        }
        let stats = instance.stats()?;
        Ok(Started {
            instance,
            lease: Some(lease),
            in_force: InForce {
                backend: "kvm-elf",
                isolation: stats.isolation.unwrap_or(Isolation::ProcessOnly),
                template_hit,
                // Made by the monitor, call by call, over the template's root.
                split_rootfs: stats.split_rootfs || spec.root.is_some(),
                pooled_cgroup: true,
            },
        })
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn start_kvm(&self, _spec: &TemplateSpec, _clone: CloneSpec) -> Result<Started> {
        bail!("backend kvm-elf is for x86-64")
    }

    fn lease(&self, id: &str, limits: &Limits) -> Result<CgroupLease> {
        let patience = PoolConfig::default().patience;
        Ok(self.pool.lease_as(id, limits, patience)?)
    }
}

/// What a program is, whatever it is called.
fn digest(program: &Path) -> Result<String> {
    let bytes = std::fs::read(program).with_context(|| format!("read {}", program.display()))?;
    Ok(blake3::hash(&bytes).to_hex().to_string())
}
