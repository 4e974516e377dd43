//! What a test may need of the machine: is it there, and how to get it.
//!
//! ```no_run
//! use carlsbad_kit::capability::Capability;
//!
//! #[test]
//! fn a_small_tmpfs_runs_full() {
//!     carlsbad_kit::require!(Capability::Root, Capability::TmpfsMount);
//!     // …
//! }
//! ```
//!
//! A capability that is missing prints `SKIPPED name: how to get it` and ends the test; where the
//! variable `CARLSBAD_REQUIRE` lists its name (or `all`), the test fails instead.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// Lists, with commas between, the capabilities that may not be missing; `all` for all.
pub const REQUIRE_VARIABLE: &str = "CARLSBAD_REQUIRE";
/// The Python interpreter to look for peers in.
pub const PYTHON_VARIABLE: &str = "CARLSBAD_PYTHON";
/// The directory for what the developer commands download; `~/.cache/carlsbad` without it.
pub const CACHE_VARIABLE: &str = "CARLSBAD_CACHE";

/// Something a machine may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Capability {
    /// This process is root.
    Root,
    /// This process may make user, mount and PID namespaces.
    Namespaces,
    /// `/dev/shm` is a tmpfs that this process may write to.
    SharedMemory,
    /// This process may mount a tmpfs of its own.
    TmpfsMount,
    /// A tmpfs with `huge=always` is backed by huge pages.
    HugeTmpfs,
    /// Huge pages that this process may set aside and mount.
    HugeTlb,
    /// Page faults that a process handles itself.
    Userfaultfd,
    /// Kernel samepage merging, and the right to switch it on.
    Ksm,
    /// `/dev/kvm` can be opened.
    Kvm,
    /// `runc`, and the right to run containers with it.
    Runc,
    /// A statically linked busybox.
    Busybox,
    /// A QEMU that emulates x86-64.
    Qemu,
    /// The distribution's kernel for virtual machines: see [`guest_kernel`].
    GuestKernel,
    /// The condensed kernel of `cargo xtask rund-kernel`: see [`condensed_kernel`].
    CondensedKernel,
    /// `mkfs.erofs`.
    ErofsTools,
    /// containerd, `ctr` and runc.
    Containerd,
    /// A CUDA driver with a device.
    Cuda,
    /// An RDMA device: an adapter, or soft RoCE.
    Rdma,
    /// A writable control group hierarchy.
    ControlGroups,
    /// A Python with ONNX Runtime and `onnx`.
    OnnxRuntime,
    /// A Python with torch and `safetensors`.
    Torch,
    /// The larger models.
    Data,
}

use Capability as C;

impl Capability {
    /// Every capability, in the order in which `cargo xtask doctor` lists them.
    pub const ALL: [Self; 22] = [
        C::Root,
        C::Namespaces,
        C::SharedMemory,
        C::TmpfsMount,
        C::HugeTmpfs,
        C::HugeTlb,
        C::Userfaultfd,
        C::Ksm,
        C::ControlGroups,
        C::Kvm,
        C::Busybox,
        C::Runc,
        C::Qemu,
        C::GuestKernel,
        C::CondensedKernel,
        C::ErofsTools,
        C::Containerd,
        C::Cuda,
        C::Rdma,
        C::OnnxRuntime,
        C::Torch,
        C::Data,
    ];

    /// Its name, as in `CARLSBAD_REQUIRE`.
    pub const fn name(self) -> &'static str {
        match self {
            C::Root => "root",
            C::Namespaces => "namespaces",
            C::SharedMemory => "shm",
            C::TmpfsMount => "tmpfs-mount",
            C::HugeTmpfs => "huge-tmpfs",
            C::HugeTlb => "hugetlb",
            C::Userfaultfd => "userfaultfd",
            C::Ksm => "ksm",
            C::Kvm => "kvm",
            C::Busybox => "busybox",
            C::Runc => "runc",
            C::Qemu => "qemu",
            C::GuestKernel => "guest-kernel",
            C::CondensedKernel => "condensed-kernel",
            C::ErofsTools => "erofs-utils",
            C::Containerd => "containerd",
            C::Cuda => "cuda",
            C::Rdma => "rdma",
            C::ControlGroups => "cgroups",
            C::OnnxRuntime => "onnxruntime",
            C::Torch => "torch",
            C::Data => "data",
        }
    }

    /// How to get it.
    pub const fn fix(self) -> &'static str {
        match self {
            C::Root => "run as root",
            C::Namespaces => {
                "run as root, or allow user namespaces (sysctl user.max_user_namespaces=1000)"
            }
            C::SharedMemory => "mount -t tmpfs tmpfs /dev/shm",
            C::TmpfsMount => "run as root, in a container with --cap-add SYS_ADMIN",
            C::HugeTmpfs => {
                "run as root on a kernel with CONFIG_TRANSPARENT_HUGEPAGE; \
                 /sys/kernel/mm/transparent_hugepage/shmem_enabled must not be `deny`"
            }
            C::HugeTlb => "run as root on a kernel with CONFIG_HUGETLBFS",
            C::Userfaultfd => {
                "run as root on a kernel with CONFIG_USERFAULTFD, \
                 or sysctl vm.unprivileged_userfaultfd=1"
            }
            C::Ksm => "run as root on a kernel with CONFIG_KSM",
            C::Kvm => "load the kvm module and join the group of /dev/kvm",
            C::Busybox => "apt install busybox-static",
            C::Runc => "apt install runc, and run as root",
            C::Qemu => "apt install qemu-system-x86",
            C::GuestKernel => "cargo xtask vm --fetch",
            C::CondensedKernel => "cargo xtask rund-kernel",
            C::ErofsTools => "apt install erofs-utils",
            C::Containerd => "apt install containerd runc",
            C::Cuda => "an NVIDIA GPU with its driver",
            C::Rdma => {
                "cargo xtask vm krcore; or: modprobe rdma_rxe, rdma link add rxe0 type rxe netdev IF"
            }
            C::ControlGroups => "run as root with /sys/fs/cgroup mounted writable",
            C::OnnxRuntime | C::Torch => "cargo xtask peers --install",
            C::Data => "cargo xtask data",
        }
    }

    /// Whether this machine has it. The first answer is remembered for the life of the process.
    pub fn state(self) -> State {
        static KNOWN: Mutex<Vec<(Capability, State)>> = Mutex::new(Vec::new());
        let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, state)) = known.iter().find(|(capability, _)| *capability == self) {
            return state.clone();
        }
        let state = self.probe();
        known.push((self, state.clone()));
        state
    }

    /// For the peers in Python: the interpreter that has them.
    pub fn python(self) -> Option<PathBuf> {
        python_with(self.import()?).map(|(python, _)| python)
    }

    /// The script that shows whether an interpreter has a peer, and prints the peer's version.
    const fn import(self) -> Option<&'static str> {
        match self {
            C::OnnxRuntime => Some("import onnxruntime, onnx; print(onnxruntime.__version__)"),
            C::Torch => Some("import torch, safetensors; print(torch.__version__)"),
            _ => None,
        }
    }

    /// Whether this machine has it.
    pub fn is_present(self) -> bool {
        matches!(self.state(), State::Present(_))
    }

    /// `name: how to get it`, as a skip says it.
    pub fn how_to_get_it(self) -> String {
        format!("{}: {}", self.name(), self.fix())
    }

    /// Whether `CARLSBAD_REQUIRE` says that it may not be missing.
    pub fn is_required(self) -> bool {
        std::env::var(REQUIRE_VARIABLE).is_ok_and(|list| {
            list.split(',')
                .any(|name| name.trim() == self.name() || name.trim() == "all")
        })
    }

    /// Whether a test that needs it can run. Where not, says `SKIPPED name: how to get it`.
    ///
    /// # Panics
    /// Where it is missing although `CARLSBAD_REQUIRE` lists it.
    #[track_caller]
    pub fn or_skip(self) -> bool {
        let State::Missing(why) = self.state() else {
            return true;
        };
        if self.is_required() {
            panic!(
                "{} is missing ({why}) and {REQUIRE_VARIABLE} requires it: {}",
                self.name(),
                self.fix()
            );
        }
        // Past the capture of the test harness: a skip that nobody sees is a lie.
        let line = format!("SKIPPED {} ({why})\n", self.how_to_get_it());
        use std::io::Write;
        let _nobody_listens = std::io::stderr().write_all(line.as_bytes());
        false
    }

    fn probe(self) -> State {
        match self {
            C::Root => State::of(nix::unistd::geteuid().is_root(), "effective uid", || {
                nix::unistd::geteuid().to_string()
            }),
            C::Namespaces => runs(
                "unshare",
                &[
                    "--user",
                    "--map-root-user",
                    "--mount",
                    "--pid",
                    "--fork",
                    "true",
                ],
            ),
            C::SharedMemory => shared_memory(),
            C::TmpfsMount => runs(
                "unshare",
                &[
                    "--mount", "mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/tmp",
                ],
            ),
            C::HugeTmpfs => huge_tmpfs(),
            C::HugeTlb => match crate::scratch::on_hugetlbfs(2 << 20) {
                Ok(place) => State::Present(place.path().display().to_string()),
                Err(why) => State::Missing(why.to_string()),
            },
            C::Userfaultfd => match crate::page_swap::PageSwap::probe() {
                Ok(()) => State::Present("userfaultfd".to_owned()),
                Err(why) => State::Missing(why.to_string()),
            },
            C::Ksm => writable("/sys/kernel/mm/ksm/run"),
            C::Kvm => writable("/dev/kvm"),
            C::Busybox => busybox(),
            C::Runc if !nix::unistd::geteuid().is_root() => State::Missing("not root".to_owned()),
            C::Runc => runs("runc", &["--version"]),
            C::Qemu => runs("qemu-system-x86_64", &["--version"]),
            C::GuestKernel => match guest_kernel() {
                Some(kernel) => State::Present(kernel.display().to_string()),
                None => State::Missing(format!("none in {}", cache_dir().join("vm").display())),
            },
            C::CondensedKernel => match condensed_kernel() {
                Some(kernel) => State::Present(kernel.display().to_string()),
                None => State::Missing(format!("none in {}", condensed_kernel_dir().display())),
            },
            C::ErofsTools => runs("mkfs.erofs", &["--help"]),
            C::Containerd => match (C::Runc.probe(), runs("ctr", &["--version"])) {
                (State::Present(_), State::Present(_)) => runs("containerd", &["--version"]),
                (State::Missing(why), _) | (_, State::Missing(why)) => State::Missing(why),
            },
            C::Cuda => cuda(),
            C::Rdma => rdma(),
            C::ControlGroups => control_groups(),
            C::OnnxRuntime | C::Torch => match self.import().and_then(python_with) {
                Some((python, version)) => {
                    State::Present(format!("{version} in {}", python.display()))
                }
                None => State::Missing("no Python here has it".to_owned()),
            },
            C::Data => {
                let marker = data_dir().join(DATA_COMPLETE);
                State::of(marker.exists(), "models", || marker.display().to_string())
            }
        }
    }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether something is there, and what was seen.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum State {
    /// It is there: its version or place.
    Present(String),
    /// It is not there: what was tried.
    Missing(String),
}

impl State {
    fn of(present: bool, what: &str, seen: impl FnOnce() -> String) -> Self {
        let text = format!("{what}: {}", seen());
        if present {
            Self::Present(text)
        } else {
            Self::Missing(text)
        }
    }
}

/// Ends the test unless the machine has every capability named; see [`capability`](crate::capability).
#[macro_export]
macro_rules! require {
    ($($capability:expr),+ $(,)?) => {
        $(if !$crate::capability::Capability::or_skip($capability) { return })+
    };
}

/// The directory for what the developer commands download: models, peers, kernel images. It lies
/// outside the source tree.
pub fn cache_dir() -> PathBuf {
    let set = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(path) = set(CACHE_VARIABLE) {
        return path.into();
    }
    if let Some(path) = set("XDG_CACHE_HOME") {
        return Path::new(&path).join("carlsbad");
    }
    match set("HOME") {
        Some(home) => Path::new(&home).join(".cache").join("carlsbad"),
        None => std::env::temp_dir().join("carlsbad-cache"),
    }
}

/// The distribution's kernel for virtual machines, where `cargo xtask vm --fetch` has put one. Ask
/// for [`Capability::GuestKernel`] first.
pub fn guest_kernel() -> Option<PathBuf> {
    let images = std::fs::read_dir(cache_dir().join("vm")).ok()?;
    let boots = images.filter_map(|image| std::fs::read_dir(image.ok()?.path().join("boot")).ok());
    boots
        .flatten()
        .filter_map(|file| Some(file.ok()?.path()))
        .find(|file| {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("vmlinuz-") && name.ends_with("cloud-amd64")
        })
}

/// Where `cargo xtask rund-kernel` keeps the kernels that it has built; `current` is the last.
pub fn condensed_kernel_dir() -> PathBuf {
    cache_dir().join("rund-kernel")
}

/// The condensed kernel, where `cargo xtask rund-kernel` has built one: an ELF file, with its
/// `System.map` and `config` beside it. Ask for [`Capability::CondensedKernel`] first.
pub fn condensed_kernel() -> Option<PathBuf> {
    let current = fs::canonicalize(condensed_kernel_dir().join("current")).ok()?;
    Some(current.join("vmlinux")).filter(|kernel| kernel.exists())
}

/// The directory of the larger models, as `cargo xtask data` fills it: `minilm-gt` and
/// `minilm-model`, each with `model.safetensors`, `config.json` and `tokenizer.json`. Ask for
/// [`Capability::Data`] first.
pub fn data_dir() -> PathBuf {
    cache_dir().join("data")
}

/// The file in [`data_dir`] that says that every model is there.
pub const DATA_COMPLETE: &str = "complete";

/// The Python interpreters in which peers are looked for: `CARLSBAD_PYTHON` alone where it is set,
/// else the environment that `cargo xtask peers --install` makes, Debian's, and the first on PATH.
pub fn pythons() -> Vec<PathBuf> {
    match std::env::var_os(PYTHON_VARIABLE) {
        Some(path) => vec![path.into()],
        None => vec![
            cache_dir().join("peers").join("bin").join("python"),
            "/usr/bin/python3".into(),
            "python3".into(),
        ],
    }
}

/// The first of [`pythons`] in which `script` runs without an error, and what it printed.
pub fn python_with(script: &str) -> Option<(PathBuf, String)> {
    pythons().into_iter().find_map(|python| {
        let out = Command::new(&python)
            .args(["-c", script])
            .stdin(Stdio::null())
            .output()
            .ok()?;
        out.status.success().then(|| {
            let words = String::from_utf8_lossy(&out.stdout).trim().to_owned();
            (python, words)
        })
    })
}

fn runs(program: &str, arguments: &[&str]) -> State {
    let said = |text: &[u8]| {
        String::from_utf8_lossy(text)
            .lines()
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    match Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
    {
        Err(why) => State::Missing(format!("{program}: {why}")),
        Ok(out) if out.status.success() => State::Present(match said(&out.stdout) {
            line if line.is_empty() => format!("{program} works"),
            line => line,
        }),
        Ok(out) => State::Missing(match said(&out.stderr) {
            line if line.is_empty() => format!("{program} failed"),
            line => line,
        }),
    }
}

/// One that names no program which loads it.
fn busybox() -> State {
    let path = "/usr/bin/busybox";
    match fs::read(path) {
        Ok(bytes) => {
            let is_static = !bytes.windows(12).any(|part| part == b"/lib64/ld-li");
            State::of(is_static, "static", || path.to_owned())
        }
        Err(why) => State::Missing(format!("{path}: {why}")),
    }
}

fn writable(path: &str) -> State {
    match fs::OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => State::Present(path.to_owned()),
        Err(why) => State::Missing(format!("{path}: {why}")),
    }
}

fn shared_memory() -> State {
    match nix::sys::statfs::statfs("/dev/shm") {
        Ok(fs) if fs.filesystem_type() != nix::sys::statfs::TMPFS_MAGIC => {
            State::Missing("/dev/shm is not a tmpfs".to_owned())
        }
        Ok(_) => match tempfile::tempfile_in("/dev/shm") {
            Ok(_) => State::Present("/dev/shm".to_owned()),
            Err(why) => State::Missing(format!("/dev/shm: {why}")),
        },
        Err(why) => State::Missing(format!("/dev/shm: {why}")),
    }
}

/// Mounts a tmpfs in a namespace of its own, fills 4 MiB of it, and looks for huge pages.
fn huge_tmpfs() -> State {
    let script = "set -e
        mount -t tmpfs -o huge=always,size=8m tmpfs /mnt
        before=$(awk '/^ShmemHugePages/ { print $2 }' /proc/meminfo)
        dd if=/dev/zero of=/mnt/x bs=2M count=2 2>/dev/null
        after=$(awk '/^ShmemHugePages/ { print $2 }' /proc/meminfo)
        echo \"ShmemHugePages $before -> $after kB\"
        test \"$after\" -gt \"$before\"";
    match runs("unshare", &["--mount", "sh", "-c", script]) {
        State::Missing(why) if why == "unshare failed" => {
            State::Missing("a tmpfs with huge=always got no huge page".to_owned())
        }
        state => state,
    }
}

fn control_groups() -> State {
    for place in ["/sys/fs/cgroup/memory", "/sys/fs/cgroup"] {
        let probe = Path::new(place).join(format!("carlsbad-probe-{}", std::process::id()));
        if fs::create_dir(&probe).is_ok() {
            return match fs::remove_dir(&probe) {
                Ok(()) => State::Present(place.to_owned()),
                Err(why) => State::Missing(format!("{}: {why}", probe.display())),
            };
        }
    }
    State::Missing("no control group can be made under /sys/fs/cgroup".to_owned())
}

/// The first RDMA device that the kernel knows.
fn rdma() -> State {
    let place = Path::new("/sys/class/infiniband");
    match fs::read_dir(place).map(|mut devices| devices.next()) {
        Ok(Some(Ok(device))) => State::Present(device.file_name().to_string_lossy().into_owned()),
        _ => State::Missing(format!("nothing in {}", place.display())),
    }
}

fn cuda() -> State {
    let device = Path::new("/dev/nvidia0");
    State::of(device.exists(), "device", || device.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::{Capability, State};

    #[test]
    fn every_capability_has_a_name_of_its_own_a_state_and_a_fix() {
        let mut names: Vec<_> = Capability::ALL.iter().map(|c| c.name()).collect();
        for capability in Capability::ALL {
            assert!(!capability.fix().is_empty());
            let (State::Present(seen) | State::Missing(seen)) = capability.state();
            assert!(!seen.is_empty(), "{capability}");
            assert_eq!(capability.state(), capability.state());
        }
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Capability::ALL.len());
    }

    #[test]
    fn root_is_what_the_kernel_says() {
        assert_eq!(
            Capability::Root.is_present(),
            nix::unistd::geteuid().is_root()
        );
    }
}
