//! Bundles as the OCI runtime specification has them: a directory with `config.json` and a root
//! file system, in terms of this crate. What it cannot do it refuses, rather than leave it out.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use carlsbad_types::ByteSize;
use oci_spec::runtime::{Process, Spec};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use crate::backend::{CloneSpec, Limits, TemplateSpec};
use crate::error::{Error, Result};

/// The configuration's name in a bundle.
const CONFIG: &str = "config.json";
/// No sensible configuration is longer.
const CONFIG_BYTES: u64 = 4 << 20;
/// Where programs are looked for without a `PATH` of the process' own.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What containers ask for as a matter of course, and every backend has or does without.
const USUAL_MOUNTS: [&str; 7] = [
    "proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue", "tmpfs",
];

/// A directory with a configuration and a root file system.
#[derive(Debug, Clone)]
pub struct Bundle {
    path: PathBuf,
    spec: Spec,
    root: PathBuf,
}

impl Bundle {
    /// Reads the bundle at `path`.
    ///
    /// # Errors
    /// [`Error::BadBundle`] where there is no configuration, it cannot be read as one, its root
    /// lies outside by `..`, or it asks for what no backend does: another user than root, a
    /// terminal, hooks, bind mounts, namespaces of somebody else's.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bad = |why: String| Error::BadBundle {
            path: path.to_owned(),
            why,
        };
        let config = path.join(CONFIG);
        let file = File::open(&config).map_err(|why| bad(format!("{CONFIG}: {why}")))?;
        let mut text = String::new();
        file.take(CONFIG_BYTES)
            .read_to_string(&mut text)
            .map_err(|why| bad(format!("{CONFIG}: {why}")))?;
        let spec: Spec =
            serde_json::from_str(&text).map_err(|why| bad(format!("{CONFIG}: {why}")))?;
        if let Some(what) = beyond(&spec) {
            return Err(bad(format!(
                "it asks for {what}, which this runtime does not do"
            )));
        }
        let root = match spec.root() {
            Some(root) => root.path().clone(),
            None => return Err(bad("it has no root".to_owned())),
        };
        if root.components().any(|part| part == Component::ParentDir) {
            return Err(bad(format!("its root `{}` has a `..`", root.display())));
        }
        Ok(Self {
            root: path.join(root),
            path: path.to_owned(),
            spec,
        })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its root file system.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The configuration.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// An annotation of the configuration.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        let annotations = self.spec.annotations().as_ref()?;
        annotations.get(name).map(String::as_str)
    }

    fn process(&self) -> Result<&Process> {
        self.spec
            .process()
            .as_ref()
            .ok_or_else(|| Error::BadBundle {
                path: self.path.clone(),
                why: "it has no process".to_owned(),
            })
    }

    /// A template of the program that the bundle's process runs.
    ///
    /// # Errors
    /// Where the root has no such program.
    pub fn template(&self) -> Result<TemplateSpec> {
        self.template_of(self.process()?)
    }

    /// The arguments, environment, directory and limits of the bundle's process.
    ///
    /// # Errors
    /// Where the configuration has no process, or limits that mean nothing.
    pub fn clone_spec(&self) -> Result<CloneSpec> {
        let mut clone = self.clone_of(self.process()?)?;
        clone.limits = self.limits();
        Ok(clone)
    }

    /// A template of the program that another process in this bundle's root runs.
    ///
    /// # Errors
    /// Where the root has no such program.
    pub fn template_of(&self, process: &Process) -> Result<TemplateSpec> {
        let (program, inside) = self.program(process)?;
        let mut template = TemplateSpec::new(program);
        template.inside = Some(inside);
        template.root = Some(self.root.clone());
        Ok(template)
    }

    /// The arguments, environment and directory of another process in this bundle's root.
    ///
    /// # Errors
    /// Where it has another user than root, or a terminal.
    pub fn clone_of(&self, process: &Process) -> Result<CloneSpec> {
        if let Some(what) = beyond_process(process) {
            return Err(Error::BadBundle {
                path: self.path.clone(),
                why: format!("it asks for {what}, which this runtime does not do"),
            });
        }
        let texts = |texts: &Option<Vec<String>>| -> Vec<OsString> {
            let texts = texts.iter().flatten();
            texts.map(OsString::from).collect()
        };
        let mut clone = CloneSpec::new()
            .args(texts(process.args()))
            .env(texts(process.env()));
        clone.cwd = Some(process.cwd().clone());
        Ok(clone)
    }

    fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        let linux = self.spec.linux().as_ref();
        let Some(resources) = linux.and_then(|linux| linux.resources().as_ref()) else {
            return limits;
        };
        // Not positive is "no limit" in all three.
        let positive = |value: i64| u64::try_from(value).ok().filter(|value| *value > 0);
        limits.memory = resources
            .memory()
            .as_ref()
            .and_then(oci_spec::runtime::LinuxMemory::limit)
            .and_then(positive)
            .map(ByteSize::new);
        limits.processes = resources
            .pids()
            .as_ref()
            .and_then(|pids| positive(pids.limit()))
            .and_then(|pids| u32::try_from(pids).ok());
        limits.cpus = resources.cpu().as_ref().and_then(|cpu| {
            let quota = cpu.quota().and_then(positive)?;
            // The kernel's default period.
            let period = cpu.period().filter(|period| *period > 0).unwrap_or(100_000);
            Some(quota as f64 / period as f64)
        });
        limits
    }

    /// The program of a process: where the host has it, and where the sandbox has it.
    fn program(&self, process: &Process) -> Result<(PathBuf, PathBuf)> {
        let bad = |why: String| Error::BadBundle {
            path: self.path.clone(),
            why,
        };
        let name = process.args().iter().flatten().next();
        let name = name.ok_or_else(|| bad("its process has no arguments".to_owned()))?;
        let candidates: Vec<PathBuf> = if name.contains('/') {
            vec![process.cwd().join(name)]
        } else {
            let env = process.env().iter().flatten();
            let path = env
                .filter_map(|pair| pair.strip_prefix("PATH="))
                .next_back();
            let folders = path.unwrap_or(PATH).split(':');
            folders
                .map(|folder| Path::new("/").join(folder).join(name))
                .collect()
        };
        for inside in candidates {
            if let Ok(host) = resolve(&self.root, &inside) {
                return Ok((host, inside));
            }
        }
        Err(bad(format!("its root has no program `{name}`")))
    }
}

/// Where the host has what is at `inside` in `root`, whatever symbolic links lie there: none leads
/// out, since an absolute one begins at the root.
fn resolve(root: &Path, inside: &Path) -> rustix::io::Result<PathBuf> {
    let folder = rustix::fs::open(
        root,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let rules = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = openat2(&folder, inside, flags, Mode::empty(), rules)?;
    let kind = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
    if kind != rustix::fs::FileType::RegularFile {
        return Err(rustix::io::Errno::ACCESS);
    }
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let path = rustix::fs::readlink(link, Vec::new())?;
    Ok(std::ffi::OsStr::from_bytes(path.to_bytes()).into())
}

/// The first thing that a configuration asks for and does not get.
fn beyond(spec: &Spec) -> Option<String> {
    if spec.hooks().as_ref().is_some_and(|hooks| {
        // An empty object asks for nothing.
        serde_json::to_value(hooks)
            .ok()
            .and_then(|hooks| hooks.as_object().cloned())
            .is_some_and(|hooks| {
                hooks
                    .values()
                    .any(|list| list.as_array().is_some_and(|list| !list.is_empty()))
            })
    }) {
        return Some("hooks".to_owned());
    }
    for mount in spec.mounts().iter().flatten() {
        let kind = mount.typ().as_deref().unwrap_or("bind");
        if !USUAL_MOUNTS.contains(&kind) {
            let at = mount.destination().display();
            return Some(format!("a {kind} mount at {at}"));
        }
    }
    let linux = spec.linux().as_ref();
    for namespace in linux
        .and_then(|linux| linux.namespaces().as_ref())
        .into_iter()
        .flatten()
    {
        if let Some(path) = namespace.path() {
            return Some(format!("the namespace {}", path.display()));
        }
    }
    spec.process().as_ref().and_then(beyond_process)
}

fn beyond_process(process: &Process) -> Option<String> {
    let user = process.user();
    if user.uid() != 0 || user.gid() != 0 {
        return Some(format!("user {}:{}", user.uid(), user.gid()));
    }
    process
        .terminal()
        .unwrap_or(false)
        .then(|| "a terminal".to_owned())
}
