//! A kernel of the distribution's or its backports', with an emulator, unpacked in the cache.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use carlsbad_kit::capability::cache_dir;
use tempfile::TempDir;

use super::{BUSYBOX, unpack};
use crate::shell;

/// The suite of newer packages for it.
const BACKPORTS: &str = "bookworm-backports";

/// An emulator and a kernel.
pub(super) struct System {
    qemu: Command,
    /// Where the kernel's package is unpacked.
    kernel: PathBuf,
    pub(super) release: String,
    pub(super) busybox: PathBuf,
}

impl System {
    /// The distribution's newest, of the package that depends on it.
    pub(super) fn distribution(kernel: &str) -> Result<Self> {
        let cache = cache_dir().join("vm");
        let package = newest(&[], kernel)?;
        Self::of(
            Command::new("qemu-system-x86_64"),
            unpack(&cache, &package)?,
            &package,
        )
    }

    /// The newest of its backports, with their emulator.
    pub(super) fn backports(kernel: &str) -> Result<Self> {
        let cache = cache_dir().join("vm");
        let apt = cache.join("backports");
        fs::create_dir_all(apt.join("lists/partial"))?;
        let sources = apt.join("sources.list");
        fs::write(&sources, backports()?)?;
        let options: Vec<String> = [
            format!("Dir::Etc::sourcelist={}", sources.display()),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={}", apt.join("lists").display()),
        ]
        .into_iter()
        .flat_map(|option| ["-o".to_owned(), option])
        .collect();
        if fs::read_dir(apt.join("lists"))?.count() < 3 {
            shell::run(
                Command::new("apt-get")
                    .args(&options)
                    .args(["update", "-q"]),
            )?;
        }
        let package = newest(&options, kernel)?;
        let kernel = fetch(&apt, &options, &[&package])?;
        let emulator = ["qemu-system-x86", "qemu-system-common", "qemu-system-data"];
        let emulator = fetch(&apt, &options, &emulator)?;
        let mut qemu = Command::new(emulator.join("usr/bin/qemu-system-x86_64"));
        qemu.arg("-L").arg(emulator.join("usr/share/qemu"));
        // The first firmware is of a package that does not change with the emulator.
        qemu.args(["-L", "/usr/share/seabios"]);
        Self::of(qemu, kernel, &package)
    }

    /// A machine of this kernel, without devices, that runs `initramfs` and says what happens on its
    /// serial line; `words` are the kernel's.
    pub(super) fn machine(&self, initramfs: &Path, words: &str) -> Command {
        let mut qemu = Command::new(self.qemu.get_program());
        qemu.args(self.qemu.get_args())
            .args(["-accel", "tcg,thread=multi", "-smp", "2"])
            .args(["-nographic", "-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-serial", "stdio"])
            .arg("-kernel")
            .arg(self.kernel.join(format!("boot/vmlinuz-{}", self.release)))
            .arg("-initrd")
            .arg(initramfs)
            .arg("-append")
            // Emulated on a busy machine, the timer is late for the kernel's check of it.
            .arg(format!(
                "console=ttyS0 quiet panic=-1 random.trust_cpu=on no_timer_check {words}"
            ))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        qemu
    }

    fn of(qemu: Command, kernel: PathBuf, package: &str) -> Result<Self> {
        let release = package.trim_start_matches("linux-image-").to_owned();
        let cache = cache_dir().join("vm");
        Ok(Self {
            qemu,
            kernel,
            release,
            busybox: unpack(&cache, BUSYBOX)?.join("bin/busybox"),
        })
    }

    /// Puts the drivers and what they need into `root`, with a list in the order of loading.
    pub(super) fn pack_modules(&self, root: &Path, modules: &[&str]) -> Result<()> {
        let folder = self.kernel.join("lib/modules").join(&self.release);
        if !folder.join("modules.dep").exists() {
            shell::output(
                Command::new("depmod")
                    .arg("-b")
                    .arg(&self.kernel)
                    .arg(&self.release),
            )
            .context("apt install kmod")?;
        }
        let (mut seen, mut list) = (BTreeSet::new(), String::new());
        fs::create_dir_all(root.join("modules"))?;
        for module in modules {
            // Not by this machine's own rules.
            let shown = Command::new("modprobe")
                .args([
                    "-C",
                    "/dev/null",
                    "--show-depends",
                    "-S",
                    &self.release,
                    "-d",
                ])
                .arg(&self.kernel)
                .arg(module)
                .output()
                .context("apt install kmod")?;
            // A kernel does not have all of them, and has some built in.
            for line in String::from_utf8_lossy(&shown.stdout).lines() {
                let Some(path) = line.strip_prefix("insmod ").map(str::trim) else {
                    continue;
                };
                if !seen.insert(path.to_owned()) {
                    continue;
                }
                let name = Path::new(path)
                    .file_name()
                    .context("a module without a name")?;
                let name = name.to_string_lossy();
                let plain = name.trim_end_matches(".xz");
                let bytes = if plain == name {
                    fs::read(path)?
                } else {
                    let unpacked = Command::new("xz").args(["-dc", path]).output()?;
                    ensure!(unpacked.status.success(), "apt install xz-utils");
                    unpacked.stdout
                };
                fs::write(root.join("modules").join(plain), bytes)?;
                list += plain;
                list += "\n";
            }
        }
        fs::write(root.join("modules/list"), list)?;
        Ok(())
    }
}

/// A line for apt: backports from where the distribution comes from here.
fn backports() -> Result<String> {
    let targets = shell::output(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(RELEASE)",
        "Created-By: Packages",
        "Component: main",
    ]))?;
    let place = targets
        .lines()
        .filter_map(|line| line.split_once(' '))
        .find(|(_, suite)| BACKPORTS.strip_suffix("-backports") == Some(suite))
        .map(|(place, _)| place)
        .context("apt knows no Debian 12: its backports have what is needed")?;
    Ok(format!(
        "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {place} {BACKPORTS} main\n"
    ))
}

/// The package that a package without content depends on.
fn newest(options: &[String], package: &str) -> Result<String> {
    shell::output(
        Command::new("apt-cache")
            .args(options)
            .args(["depends", package]),
    )?
    .lines()
    .find_map(|line| line.trim().strip_prefix("Depends: ").map(str::to_owned))
    .with_context(|| format!("apt knows no {package}: apt-get update"))
}

/// Downloads packages and unpacks them into one folder, unless it is there.
pub(crate) fn fetch(cache: &Path, options: &[String], packages: &[&str]) -> Result<PathBuf> {
    let root = cache.join(packages.first().context("no packages")?);
    if root.exists() {
        return Ok(root);
    }
    fs::create_dir_all(cache)?;
    let scratch: TempDir = tempfile::Builder::new().tempdir_in(cache)?;
    shell::run(
        Command::new("apt-get")
            .current_dir(scratch.path())
            .args(options)
            .args(["download", "-q"])
            .args(packages),
    )?;
    let unpacked = scratch.path().join("unpacked");
    for entry in fs::read_dir(scratch.path())? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            shell::output(Command::new("dpkg-deb").arg("-x").arg(&path).arg(&unpacked))?;
        }
    }
    fs::rename(&unpacked, &root).with_context(|| format!("cannot make {}", root.display()))?;
    Ok(root)
}
