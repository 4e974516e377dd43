//! Bundles as the OCI runtime specification has them: a directory with `config.json` and a root
//! file system, in terms of this crate. What it cannot do it refuses, rather than leave it out.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use carlsbad_types::ByteSize;
use oci_spec::runtime::{Process, Spec};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use serde_json::Value;

use crate::backend::{CloneSpec, Limits, TemplateSpec};
use crate::error::{Error, Result};

/// The configuration's name in a bundle.
const CONFIG: &str = "config.json";
/// No sensible configuration is longer.
const CONFIG_BYTES: u64 = 4 << 20;
/// Where programs are looked for without a `PATH` of the process' own.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Mounts that a default configuration has, by kind and place. What a backend has not of them is
/// not there, which a program sees.
const USUAL_MOUNTS: [(&str, &str); 9] = [
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("cgroup", "/sys/fs/cgroup"),
    ("cgroup2", "/sys/fs/cgroup"),
    ("devpts", "/dev/pts"),
    ("mqueue", "/dev/mqueue"),
    ("tmpfs", "/dev"),
    ("tmpfs", "/dev/shm"),
    ("tmpfs", "/run"),
];
/// The options that they have there.
const USUAL_OPTIONS: [&str; 13] = [
    "nosuid",
    "noexec",
    "nodev",
    "relatime",
    "strictatime",
    "newinstance",
    "ro",
    "mode=755",
    "mode=0620",
    "mode=1777",
    "ptmxmode=0666",
    "gid=5",
    "size=65536k",
];
/// The capabilities of a default configuration. A sandbox has none at the host, and more than these
/// is asked for to reach something there.
const USUAL_CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];
/// The one limit of resources that a default configuration has.
const USUAL_RLIMIT: (&str, u64) = ("RLIMIT_NOFILE", 1024);
/// The kernel's default, which container managers write out.
const USUAL_CPU_SHARES: u64 = 1024;
/// What is read of each part of a configuration, is checked, or means nothing to a sandbox: what it
/// hides or protects of `/proc` is not there, and no mount goes in or out of it.
const READ: [(&str, &[&str]); 7] = [
    (
        "",
        &[
            "ociVersion",
            "root",
            "process",
            "hostname",
            "mounts",
            "annotations",
            "linux",
        ],
    ),
    ("/root", &["path", "readonly"]),
    (
        "/linux",
        &[
            "namespaces",
            "resources",
            "cgroupsPath",
            "maskedPaths",
            "readonlyPaths",
            "rootfsPropagation",
        ],
    ),
    (
        "/linux/resources",
        // Which devices may be opened: those that are there may be.
        &["memory", "cpu", "pids", "devices"],
    ),
    ("/linux/resources/memory", &["limit"]),
    ("/linux/resources/cpu", &["quota", "period", "shares"]),
    ("/linux/resources/pids", &["limit"]),
];
/// The same of a process.
const READ_OF_PROCESS: [(&str, &[&str]); 2] = [
    (
        "",
        &[
            "terminal",
            "user",
            "args",
            "env",
            "cwd",
            "capabilities",
            "rlimits",
            "noNewPrivileges",
        ],
    ),
    ("/user", &["uid", "gid", "additionalGids"]),
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
    /// terminal, hooks, mounts, devices, capabilities or system call filters beyond those of a
    /// default configuration, namespaces of somebody else's.
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
        let json: Value =
            serde_json::from_str(&text).map_err(|why| bad(format!("{CONFIG}: {why}")))?;
        let spec: Spec =
            serde_json::from_value(json.clone()).map_err(|why| bad(format!("{CONFIG}: {why}")))?;
        if let Some(what) = beyond(&spec, &json) {
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

    /// The configuration. Whether its root is read-only is for the caller to see to: a template's root
    /// is with backend `process` without a store of roots, and with `kvm-elf` where a clone's
    /// [`Limits::upper`](crate::Limits::upper) is nothing.
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
        self.clone_of(self.process()?)
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

    /// The arguments, environment and directory of another process in this bundle's root, and the
    /// bundle's limits.
    ///
    /// # Errors
    /// Where it asks for what no backend does, as in [`open`](Self::open).
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
        clone.limits = self.limits();
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
        let found = candidates
            .iter()
            .find_map(|inside| resolve(&self.root, inside).ok());
        if let Some(found) = found {
            return Ok(found);
        }
        Err(bad(format!("its root has no program `{name}`")))
    }
}

/// Where the host has what is at `inside` in `root`, and where `root` has it, behind all symbolic
/// links: none leads out, since an absolute one begins at the root.
fn resolve(root: &Path, inside: &Path) -> rustix::io::Result<(PathBuf, PathBuf)> {
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
    let host = path_of(&file)?;
    let below = host.strip_prefix(path_of(&folder)?);
    // Moved away meanwhile.
    let below = below.map_err(|_| rustix::io::Errno::NOENT)?;
    Ok((host.clone(), Path::new("/").join(below)))
}

/// The path of what is open.
fn path_of(open: &OwnedFd) -> rustix::io::Result<PathBuf> {
    let link = format!("/proc/self/fd/{}", open.as_raw_fd());
    let path = rustix::fs::readlink(link, Vec::new())?;
    Ok(OsStr::from_bytes(path.to_bytes()).into())
}

/// The first thing that a configuration asks for and does not get.
fn beyond(spec: &Spec, json: &Value) -> Option<String> {
    let linux = spec.linux().as_ref();
    let device = || {
        let device = linux?.devices().as_ref()?.first()?;
        Some(format!("the device {}", device.path().display()))
    };
    let namespace = || {
        let mut namespaces = linux?.namespaces().iter().flatten();
        let path = namespaces.find_map(|one| one.path().clone())?;
        Some(format!("the namespace {}", path.display()))
    };
    let shares = || {
        let shares = json.pointer("/linux/resources/cpu/shares")?;
        let is_other = says_something(shares) && *shares != USUAL_CPU_SHARES;
        is_other.then(|| format!("{shares} shares of the processors"))
    };
    device()
        .or_else(|| spec.mounts().iter().flatten().find_map(beyond_mount))
        .or_else(namespace)
        .or_else(shares)
        .or_else(|| unread(json, &READ))
        .or_else(|| spec.process().as_ref().and_then(beyond_process))
}

fn beyond_mount(mount: &oci_spec::runtime::Mount) -> Option<String> {
    let at = mount.destination();
    let kind = mount.typ().as_deref().unwrap_or("bind");
    let is_usual = |(usual, place): &(&str, &str)| *usual == kind && at == Path::new(place);
    if !USUAL_MOUNTS.iter().any(is_usual) {
        return Some(format!("a {kind} mount at {}", at.display()));
    }
    let mut options = mount.options().iter().flatten();
    let other = options.find(|option| {
        !USUAL_OPTIONS.contains(&option.as_str()) || (kind == "tmpfs" && *option == "ro")
    })?;
    Some(format!("{kind} at {} with option {other}", at.display()))
}

fn beyond_process(process: &Process) -> Option<String> {
    let user = process.user();
    if user.uid() != 0 || user.gid() != 0 {
        return Some(format!("user {}:{}", user.uid(), user.gid()));
    }
    if process.terminal().unwrap_or(false) {
        return Some("a terminal".to_owned());
    }
    // What was read as a process can be written as one.
    let json = serde_json::to_value(process).unwrap_or_default();
    let kinds = json.get("capabilities").and_then(Value::as_object);
    let mut capabilities = kinds
        .into_iter()
        .flat_map(|kinds| kinds.values())
        .filter_map(Value::as_array)
        .flatten()
        .filter_map(Value::as_str);
    if let Some(other) = capabilities.find(|one| !USUAL_CAPABILITIES.contains(one)) {
        return Some(format!("the capability {other}"));
    }
    for limit in process.rlimits().iter().flatten() {
        let (kind, soft) = (limit.typ().to_string(), limit.soft());
        if (kind.as_str(), soft) != USUAL_RLIMIT {
            return Some(format!("{kind} {soft}"));
        }
    }
    unread(&json, &READ_OF_PROCESS)
}

/// The first setting that says something and is not read.
fn unread(json: &Value, read: &[(&str, &[&str])]) -> Option<String> {
    read.iter().find_map(|(part, known)| {
        let settings = json.pointer(part)?.as_object()?;
        let unread = |(name, value): &(&String, &Value)| {
            !known.contains(&name.as_str()) && says_something(value)
        };
        let (name, _) = settings.iter().find(unread)?;
        let part = part.trim_start_matches('/').replace('/', ".");
        Some(if part.is_empty() {
            name.clone()
        } else {
            format!("{part}.{name}")
        })
    })
}

/// Whether a setting asks for anything: "none" is said in many ways, and -1 is "no limit".
fn says_something(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Bool(true) => true,
        Value::Number(number) => number.as_i64().is_none_or(|number| number > 0),
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => !list.is_empty(),
        Value::Object(object) => object.values().any(says_something),
    }
}
