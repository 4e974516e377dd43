//! `cargo xtask vm`: a crate's tests on another kernel, as root of a machine of its own, in QEMU.
//!
//! The kernel is Debian's, with nothing but a test binary, what it links, and a few tools in an
//! initial file system. It is emulated: what passes here does not depend on this machine's kernel,
//! and what is measured here means nothing.

mod directcxl;
mod follow;
pub(crate) mod krcore;
mod rund_rt;
pub(crate) mod system;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use carlsbad_kit::capability::{Capability, State, cache_dir};
use serde::Deserialize;
use tempfile::NamedTempFile;

use self::follow::follow;
use crate::shell;
use crate::workspace::{Package, Workspace};

/// The package that depends on the newest kernel for virtual machines.
const KERNEL: &str = "linux-image-cloud-amd64";
const BUSYBOX: &str = "busybox-static";
/// What tests start, besides the shell.
const TOOLS: [&str; 5] = [
    "/usr/bin/unshare",
    "/usr/bin/setpriv",
    "/usr/bin/mount",
    "/usr/bin/umount",
    "/usr/bin/env",
];

/// Arguments of `cargo xtask vm`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// One of the ten; all that exist without it.
    #[arg(value_name = "CRATE")]
    name: Option<String>,
    /// Only fetch the kernel that tests boot guests of.
    #[arg(long)]
    fetch: bool,
    /// Only these test targets; of directcxl only these machines: pmem, switch, hosts, program,
    /// poison.
    #[arg(long = "test", value_name = "TARGET")]
    tests: Vec<String>,
    /// How long one machine may run.
    #[arg(long, default_value_t = 900, value_name = "SECONDS")]
    timeout: u64,
    /// Memory of the machine, in MiB.
    #[arg(long, default_value_t = 3072)]
    memory: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.fetch {
        let images = Images::get()?;
        eprintln!("{}", images.kernel.display());
        return Ok(());
    }
    if let State::Missing(why) = Capability::Qemu.state() {
        bail!("{why}: {}", Capability::Qemu.fix());
    }
    let workspace = Workspace::load()?;
    for package in workspace.chosen(arguments.name.as_deref())? {
        match package.name.as_str() {
            "directcxl" => {
                directcxl::run(package, &arguments.tests)?;
                continue;
            }
            "krcore" => {
                krcore::run(package, &arguments.tests)?;
                continue;
            }
            "rund-rt" => {
                rund_rt::run(package, &arguments.tests)?;
                continue;
            }
            _ => {}
        }
        let images = Images::get()?;
        let mut tests = package.vm_tests().to_vec();
        if !arguments.tests.is_empty() {
            tests.clone_from(&arguments.tests);
        }
        if tests.is_empty() {
            eprintln!("{}: nothing to run in a machine of its own", package.name);
        }
        for test in tests {
            let binary = build(package, &test)?;
            let initramfs = images.pack(&binary)?;
            eprintln!("{} {test} on {}", package.name, images.release);
            boot(&images.kernel, initramfs.path(), arguments)
                .with_context(|| format!("{} {test} on {}", package.name, images.release))?;
        }
    }
    Ok(())
}

/// The kernel and the shell, unpacked in the cache.
struct Images {
    kernel: PathBuf,
    release: String,
    busybox: PathBuf,
}

impl Images {
    fn get() -> Result<Self> {
        let cache = cache_dir().join("vm");
        let package = shell::output(Command::new("apt-cache").args(["depends", KERNEL]))?
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: ").map(str::to_owned))
            .with_context(|| format!("apt knows no {KERNEL}: apt-get update"))?;
        let root = unpack(&cache, &package)?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        Ok(Self {
            kernel: root.join("boot").join(format!("vmlinuz-{release}")),
            release,
            busybox: unpack(&cache, BUSYBOX)?.join("bin/busybox"),
        })
    }

    /// An initial file system that runs `binary` and switches the machine off.
    fn pack(&self, binary: &Path) -> Result<NamedTempFile> {
        let directory = tempfile::Builder::new().prefix("carlsbad-vm-").tempdir()?;
        let root = directory.path();
        for name in ["bin", "dev", "proc", "sys", "tmp", "mnt", "run", "usr/bin"] {
            fs::create_dir_all(root.join(name))?;
        }
        let busybox = root.join("bin/busybox");
        fs::copy(&self.busybox, &busybox)?;
        for name in [
            "sh", "cat", "sleep", "dd", "awk", "test", "true", "id", "poweroff", "mkdir",
        ] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name))?;
        }
        for tool in TOOLS {
            copy_with_libraries(Path::new(tool), tool, root)?;
        }
        copy_with_libraries(binary, "/test", root)?;
        fs::write(root.join("init"), include_str!("init.sh"))?;
        make_executable(&root.join("init"))?;

        archive(root)
    }
}

/// The distribution's kernel for virtual machines, and a static shell.
pub(crate) fn images() -> Result<(PathBuf, PathBuf)> {
    let images = Images::get()?;
    Ok((images.kernel, images.busybox))
}

/// The initial file system that `root`, which has busybox, becomes.
pub(crate) fn archive(root: &Path) -> Result<NamedTempFile> {
    let archive = tempfile::Builder::new()
        .prefix("carlsbad-initramfs-")
        .tempfile()?;
    shell::output(
        Command::new("sh")
            .current_dir(root)
            .args(["-c", "find . | ./bin/busybox cpio -o -H newc > \"$0\""])
            .arg(archive.path()),
    )?;
    Ok(archive)
}

/// Downloads a package of the distribution and unpacks it, unless it is there.
fn unpack(cache: &Path, package: &str) -> Result<PathBuf> {
    system::fetch(cache, &[], &[package])
        .context("kernels come from the distribution: apt-get update")
}

/// Builds one test target; gives its binary.
fn build(package: &Package, test: &str) -> Result<PathBuf> {
    build_with_programs(package, test).map(|(binary, _)| binary)
}

/// Builds one test target; gives its binary, and the package's own programs.
fn build_with_programs(package: &Package, test: &str) -> Result<(PathBuf, Vec<PathBuf>)> {
    build_target(package, &["test", "--no-run"], "--test", test)
}

/// Builds one example; gives its binary.
fn build_example(package: &Package, example: &str) -> Result<PathBuf> {
    build_target(package, &["build"], "--example", example).map(|(binary, _)| binary)
}

/// Builds one bench target; gives its binary.
fn build_bench(package: &Package, bench: &str) -> Result<PathBuf> {
    build_target(package, &["bench", "--no-run"], "--bench", bench).map(|(binary, _)| binary)
}

fn build_target(
    package: &Package,
    command: &[&str],
    kind: &str,
    name: &str,
) -> Result<(PathBuf, Vec<PathBuf>)> {
    #[derive(Deserialize)]
    struct Built {
        executable: Option<PathBuf>,
        target: Option<Target>,
    }
    #[derive(Deserialize)]
    struct Target {
        name: String,
        kind: Vec<String>,
    }
    let messages = shell::output(
        shell::cargo()
            .args(command)
            .args(["--message-format", "json"])
            .args(package.cargo_arguments())
            .args([kind, name])
            .stderr(Stdio::inherit()),
    )?;
    let (mut binary, mut programs) = (None, Vec::new());
    for built in messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Built>(line).ok())
    {
        let (Some(executable), Some(target)) = (built.executable, built.target) else {
            continue;
        };
        if target.kind.iter().any(|kind| kind == "bin") {
            programs.push(executable);
        } else if target.name == name {
            binary = Some(executable);
        }
    }
    let binary = binary.with_context(|| format!("cargo built no {name}"))?;
    Ok((binary, programs))
}

/// Puts a program into `root` as `name`, with the libraries it is linked with.
fn copy_with_libraries(program: &Path, name: &str, root: &Path) -> Result<()> {
    let place = |path: &str| root.join(path.trim_start_matches('/'));
    fs::copy(program, place(name)).with_context(|| format!("cannot copy {}", program.display()))?;
    let linked = shell::output(Command::new("ldd").arg(program))?;
    for word in linked
        .split_whitespace()
        .filter(|word| word.starts_with('/'))
    {
        let to = place(word);
        if !to.exists() {
            if let Some(folder) = to.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::copy(word, &to).with_context(|| format!("cannot copy {word}"))?;
        }
    }
    Ok(())
}

/// Runs the machine to its end, with its output on ours.
fn boot(kernel: &Path, initramfs: &Path, arguments: &Arguments) -> Result<()> {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args([
            "-M",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
            "-smp",
            "2",
        ])
        .args(["-m", &format!("{}M", arguments.memory)])
        .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
        .args(["-serial", "stdio"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args([
            "-append",
            "console=ttyS0 quiet panic=-1 random.trust_cpu=on",
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start QEMU")?;
    follow(&mut qemu, Duration::from_secs(arguments.timeout), |_| {})
}

pub(crate) fn make_executable(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755))?;
    Ok(())
}
