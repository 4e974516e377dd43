//! What all containers share: the backend, templates, control groups, and the store of root file
//! systems.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use carlsbad_types::ByteSize;
use rund_rt::cgroup::{CgroupPool, Hierarchy, PoolConfig};
use rund_rt::rootfs::{Image, Rootfs, RootfsConfig, RootfsStore};
use rund_rt::{Backend, CloneSpec, Instance, Isolation, ProcessBackend, Template, TemplateSpec};
use serde::Serialize;

/// The default backend.
pub(crate) const KVM_ELF: &str = "kvm-elf";
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
    process: ProcessBackend,
    #[cfg(target_arch = "x86_64")]
    kvm: rund_rt::KvmElf,
    /// Programs that were prepared, by [`key`].
    known: Mutex<HashMap<String, Template>>,
    templates: PathBuf,
}

/// A sandbox, and what it was given.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) instance: Box<dyn Instance>,
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
            // It puts a monitor into its group before that has a guest, so that all that a guest
            // forks is in it too.
            #[cfg(target_arch = "x86_64")]
            kvm: rund_rt::KvmElf::new().cgroups(pool),
            known: Mutex::default(),
            templates: templates.map_or_else(|| TEMPLATES.into(), PathBuf::from),
        })
    }

    /// The backend that a container asks for, or else the machine's setting, or else `kvm-elf`.
    /// Never another one than was asked for.
    pub(crate) fn backend(&self, annotation: Option<&str>) -> Result<&'static str> {
        let setting = std::env::var(BACKEND_VARIABLE).ok();
        match annotation.or(setting.as_deref()).unwrap_or(KVM_ELF) {
            "process" => Ok("process"),
            KVM_ELF => Ok(KVM_ELF),
            other => bail!("no backend is called `{other}`: `kvm-elf` or `process`"),
        }
    }

    /// A writable root of a container's own over the bundle's.
    pub(crate) fn split(&self, root: &Path, size: ByteSize) -> Result<Rootfs> {
        let lower = self.store.lower(&Image::directory(root)?)?;
        Ok(self.store.split_sized(&lower, size)?)
    }

    /// Starts a program. With backend `process` its root is `root`, or where there is none the
    /// bundle's, read-only.
    pub(crate) fn start(
        &self,
        backend: &'static str,
        template: &TemplateSpec,
        mut clone: CloneSpec,
        root: Option<&Rootfs>,
    ) -> Result<Started> {
        if backend == KVM_ELF {
            return self.start_kvm(template, clone);
        }
        let (template, template_hit) = match root {
            Some(root) => {
                clone.root = Some(root.path());
                self.prepared(template)?
            }
            None => (self.process.build_template(template)?, false),
        };
        let instance = self.process.clone_from(&template, clone)?;
        Ok(Started {
            instance,
            in_force: InForce {
                backend,
                isolation: Isolation::ProcessOnly,
                template_hit,
                split_rootfs: root.is_some(),
                pooled_cgroup: true,
            },
        })
    }

    /// A program's template for backend `process`, without a root: made or found.
    fn prepared(&self, spec: &TemplateSpec) -> Result<(Template, bool)> {
        let key = key(spec)?;
        let lock = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(template) = lock().get(&key) {
            return Ok((template.clone(), true));
        }
        let mut rootless = spec.clone();
        rootless.root = None;
        let made = self.process.build_template(&rootless)?;
        lock().insert(key, made.clone());
        Ok((made, false))
    }

    #[cfg(target_arch = "x86_64")]
    fn start_kvm(&self, spec: &TemplateSpec, clone: CloneSpec) -> Result<Started> {
        let backend = &self.kvm;
        let name = format!("{}.rund", key(spec)?);
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
        let writes = clone.limits.upper > ByteSize::ZERO;
        let instance = backend.clone_from(&template, clone)?;
        let stats = instance.stats()?;
        Ok(Started {
            instance,
            in_force: InForce {
                backend: KVM_ELF,
                isolation: stats.isolation.unwrap_or(Isolation::ProcessOnly),
                template_hit,
                // Made by the monitor, call by call, over the template's root.
                split_rootfs: stats.split_rootfs || (spec.root.is_some() && writes),
                pooled_cgroup: stats.pooled_cgroup,
            },
        })
    }

    #[cfg(not(target_arch = "x86_64"))]
    fn start_kvm(&self, _spec: &TemplateSpec, _clone: CloneSpec) -> Result<Started> {
        bail!("backend kvm-elf is for x86-64")
    }
}

/// What a program is: its content, and where it finds itself (`/proc/self/exe`).
fn key(spec: &TemplateSpec) -> Result<String> {
    let program = &spec.program;
    let bytes = std::fs::read(program).with_context(|| format!("read {}", program.display()))?;
    let mut key = blake3::Hasher::new();
    // The length first, so that no content ends in another's path.
    key.update(&(bytes.len() as u64).to_le_bytes());
    key.update(&bytes);
    key.update(spec.path_inside().as_os_str().as_bytes());
    Ok(key.finalize().to_hex().to_string())
}
