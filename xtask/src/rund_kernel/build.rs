//! Building the kernel, once for each content of its settings, source and compiler.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use carlsbad_kit::capability::{cache_dir, condensed_kernel_dir};

use crate::shell;
use crate::vm::system::fetch;

/// The distribution's source, as patched by it.
const SOURCE: &str = "linux-source-6.1";
/// The settings.
const CONFIG: &str = include_str!("condensed.config");
/// What is needed to build it: a program, and the package that has it.
const TOOLS: [(&str, &str); 8] = [
    ("make", "make"),
    ("gcc", "gcc"),
    ("flex", "flex"),
    ("bison", "bison"),
    ("bc", "bc"),
    ("xz", "xz-utils"),
    ("strip", "binutils"),
    ("dpkg-deb", "dpkg"),
];
/// Its headers: a file to include, and the package that has it.
const HEADERS: [(&str, &str); 2] = [
    ("libelf.h", "libelf-dev"),
    ("openssl/opensslv.h", "libssl-dev"),
];
/// What folders are called in which kernels are made.
const SOURCES: &str = ".build-";
const DONE: &str = ".done-";
/// How old one of them is whose build is no more.
const ABANDONED: Duration = Duration::from_secs(24 * 3600);
/// How often progress is said.
const OFTEN: Duration = Duration::from_secs(10);
/// How much of a failed build is shown.
const LAST_LINES: usize = 20;

/// A kernel in the cache.
pub(super) struct Kernel {
    folder: PathBuf,
    /// How long it took, where it was built now.
    pub(super) seconds: Option<u64>,
}

impl Kernel {
    /// The one of these settings: from the cache, or built.
    pub(super) fn get(more: Option<&Path>, jobs: u32) -> Result<Self> {
        let mut config = CONFIG.to_owned();
        if let Some(path) = more {
            config += &fs::read_to_string(path)
                .with_context(|| format!("cannot read {}", path.display()))?;
        }
        let missing = missing();
        let place = condensed_kernel_dir();
        let folder = if missing.is_empty() {
            place.join(key(&config)?)
        } else {
            bail!("apt install {}", missing.join(" "));
        };
        let mut kernel = Self {
            folder,
            seconds: None,
        };
        if !kernel.elf().exists() {
            let begun = Instant::now();
            kernel.build(&config, jobs)?;
            kernel.seconds = Some(begun.elapsed().as_secs());
        }
        // Tests find it by this name, which always leads to a whole one.
        let (current, next) = (place.join("current"), place.join("next"));
        let _none = fs::remove_file(&next);
        std::os::unix::fs::symlink(kernel.folder.file_name().context("no name")?, &next)?;
        fs::rename(next, current)?;
        Ok(kernel)
    }

    /// What QEMU enters directly (PVH), without symbols.
    pub(super) fn elf(&self) -> PathBuf {
        self.folder.join("vmlinux")
    }

    /// The same, compressed, with its own decompressor.
    pub(super) fn image(&self) -> PathBuf {
        self.folder.join("bzImage")
    }

    fn build(&self, config: &str, jobs: u32) -> Result<()> {
        let place = condensed_kernel_dir();
        let package = fetch(&cache_dir().join("vm"), &[], &[SOURCE])
            .context("the kernel's source comes from the distribution: apt-get update")?;
        sweep(&place)?;
        let scratch = tempfile::Builder::new()
            .prefix(SOURCES)
            .tempdir_in(&place)?;
        let root = scratch.path();
        shell::run(
            Command::new("tar")
                .args(["--strip-components=1", "-xf"])
                .arg(package.join(format!("usr/src/{SOURCE}.tar.xz")))
                .arg("-C")
                .arg(root),
        )?;
        let wanted = root.join("condensed.config");
        fs::write(&wanted, config)?;
        let mut make = make(root);
        make.env("KCONFIG_ALLCONFIG", &wanted).arg("allnoconfig");
        shell::output(&mut make)?;
        let got = fs::read_to_string(root.join(".config"))?;
        let lost = lost(config, &got);
        ensure!(
            lost.is_empty(),
            "the kernel does not take these settings: {}",
            lost.join(", ")
        );
        compile(root, jobs)?;
        // It appears when it is complete.
        let done = tempfile::Builder::new().prefix(DONE).tempdir_in(&place)?;
        let into = done.path();
        shell::output(
            Command::new("strip")
                .arg("-s")
                .arg("-o")
                .arg(into.join("vmlinux"))
                .arg(root.join("vmlinux")),
        )?;
        fs::copy(root.join("arch/x86/boot/bzImage"), into.join("bzImage"))?;
        fs::copy(root.join("System.map"), into.join("System.map"))?;
        fs::copy(root.join(".config"), into.join("config"))?;
        let whole = done.keep();
        fs::set_permissions(&whole, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        fs::rename(&whole, &self.folder)
            .with_context(|| format!("cannot make {}", self.folder.display()))
    }
}

/// Removes what builds have left that were killed.
fn sweep(place: &Path) -> Result<()> {
    for entry in fs::read_dir(place)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
        if [SOURCES, DONE].iter().any(|kind| name.starts_with(kind)) && age > ABANDONED {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// The packages that are not installed.
fn missing() -> Vec<&'static str> {
    let runs = |program: &str| {
        Command::new(program)
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .is_ok()
    };
    let has = |header: &str| {
        let mut cc = Command::new("cc");
        cc.args([
            "-E",
            "-o",
            "/dev/null",
            "-x",
            "c",
            "-include",
            header,
            "/dev/null",
        ]);
        cc.stdin(Stdio::null()).stderr(Stdio::null());
        cc.status().is_ok_and(|status| status.success())
    };
    let tools = TOOLS.into_iter().filter(|(program, _)| !runs(program));
    let headers = HEADERS.into_iter().filter(|(header, _)| !has(header));
    tools.chain(headers).map(|(_, package)| package).collect()
}

/// A name for what is built: of settings, source and compiler.
fn key(config: &str) -> Result<String> {
    let place = condensed_kernel_dir();
    fs::create_dir_all(&place)?;
    let source =
        shell::output(Command::new("apt-cache").args(["show", "--no-all-versions", SOURCE]))?;
    let version = source
        .lines()
        .find_map(|line| line.strip_prefix("Version: "))
        .with_context(|| format!("apt knows no {SOURCE}: apt-get update"))?;
    let compiler = shell::output(Command::new("gcc").arg("--version"))?;
    let compiler = compiler.lines().next().unwrap_or_default();
    let hash = blake3::hash(format!("{version}\n{compiler}\n{config}").as_bytes());
    Ok(format!("{}-{}", version, &hash.to_hex()[..16]))
}

/// Settings that were asked for and are not in force.
fn lost<'a>(wanted: &'a str, got: &str) -> Vec<&'a str> {
    let is_off = |line: &str| line.starts_with("# CONFIG_") && line.ends_with(" is not set");
    let in_force = |line: &str| {
        got.lines().any(|other| other == line)
            // One whose subject is gone altogether is not in the file.
            || is_off(line)
                && line
                    .split(' ')
                    .nth(1)
                    .is_some_and(|name| !got.contains(&format!("\n{name}=")))
    };
    wanted
        .lines()
        .map(str::trim_end)
        .filter(|line| line.starts_with("CONFIG_") || is_off(line))
        .filter(|line| !in_force(line))
        .collect()
}

fn make(root: &Path) -> Command {
    let mut make = Command::new("make");
    // The same bytes whoever builds it, and when.
    make.arg("-C")
        .arg(root)
        .args([
            "ARCH=x86_64",
            "KBUILD_BUILD_USER=rund",
            "KBUILD_BUILD_HOST=rund",
        ])
        .arg("KBUILD_BUILD_TIMESTAMP=1970-01-01")
        // What the caller's own make or cargo says is not for this one.
        .env_remove("MAKEFLAGS")
        .env_remove("CARGO_MAKEFLAGS")
        .stdin(Stdio::null());
    make
}

/// Compiles, and says how far it is.
fn compile(root: &Path, jobs: u32) -> Result<()> {
    let log = root.join("build.log");
    let mut child = make(root)
        .arg(format!("-j{jobs}"))
        .args(["vmlinux", "bzImage"])
        .stdout(Stdio::piped())
        .stderr(File::create(root.join("errors.log"))?)
        .spawn()
        .context("cannot run make")?;
    let output = child.stdout.take().context("no output")?;
    let mut kept = File::create(&log)?;
    let (begun, mut said, mut files) = (Instant::now(), Instant::now(), 0);
    for line in BufReader::new(output).lines() {
        let line = line?;
        writeln!(kept, "{line}")?;
        files += u32::from(["  CC ", "  AS "].iter().any(|kind| line.starts_with(kind)));
        if said.elapsed() >= OFTEN {
            said = Instant::now();
            eprintln!("  {files} files compiled, {} s", begun.elapsed().as_secs());
        }
    }
    let status = child.wait()?;
    if !status.success() {
        let errors = fs::read_to_string(root.join("errors.log"))?;
        let lines: Vec<_> = errors.lines().collect();
        let last = lines.len().saturating_sub(LAST_LINES);
        bail!("make: {status}\n{}", lines[last..].join("\n"));
    }
    eprintln!("  {files} files compiled, {} s", begun.elapsed().as_secs());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{CONFIG, lost};

    #[test]
    fn settings_that_are_not_in_force_are_named() {
        let got = "#\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_D=y\n";
        let wanted = "# text\nCONFIG_A=y\n# CONFIG_B is not set\n# CONFIG_C is not set\n";
        assert!(lost(wanted, got).is_empty());
        let wanted = "CONFIG_B=y\n# CONFIG_D is not set\nCONFIG_E=4\n";
        assert_eq!(
            lost(wanted, got),
            ["CONFIG_B=y", "# CONFIG_D is not set", "CONFIG_E=4"]
        );
    }

    #[test]
    fn the_condensed_kernel_has_no_modules_and_what_the_guest_mounts() {
        for line in [
            "# CONFIG_MODULES is not set",
            "CONFIG_EROFS_FS=y",
            "CONFIG_OVERLAY_FS=y",
            "CONFIG_VIRTIO_BLK=y",
            "CONFIG_PVH=y",
        ] {
            assert!(CONFIG.lines().any(|other| other == line), "{line}");
        }
    }
}
