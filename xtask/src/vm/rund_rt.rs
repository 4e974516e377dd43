//! A machine whose KVM is of the SVM kind, for `rund-rt`: QEMU emulates AMD's virtualisation.
//!
//! The tests are those of every machine. What they make guests of (C and Rust programs) is made
//! here, since there is no compiler there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::NamedTempFile;

use super::follow::follow;
use super::system::System;
use super::{archive, build_with_programs, copy_with_libraries, make_executable};
use crate::shell;
use crate::workspace::Package;

/// The package that depends on the newest kernel with all drivers, of the backports: it finds
/// dirty pages for a reset (Linux 6.7), and the distribution's own does not.
const KERNEL: &str = "linux-image-amd64";
/// In the order in which they have to be loaded.
const MODULES: [&str; 7] = [
    "irqbypass",
    "kvm",
    "ccp",
    "kvm-amd",
    "loop",
    "erofs",
    "overlay",
];
/// Test targets that run there.
const TARGETS: [&str; 7] = [
    "hostile",
    "clones",
    "processes",
    "busybox",
    "limits",
    "cgroup",
    "process",
];
/// How long a machine may run.
const PATIENCE: Duration = Duration::from_secs(600);

/// Runs every test target in a machine of its own; with `only`, those of these names.
pub(super) fn run(package: &Package, only: &[String]) -> Result<()> {
    let system = System::backports(KERNEL)?;
    for target in TARGETS {
        if !only.is_empty() && !only.iter().any(|name| name == target) {
            continue;
        }
        let (test, programs) = build_with_programs(package, target)?;
        let initramfs = pack(&system, package, &test, &programs)?;
        let begun = Instant::now();
        eprintln!("rund-rt {target} on {}", system.release);
        // The emulator of the backports has what the distribution's has, and fewer faults.
        let mut machine = system
            .machine(initramfs.path(), "")
            .args(["-M", "q35", "-cpu", "EPYC,+svm", "-m", "3G"])
            .spawn()
            .context("cannot start QEMU")?;
        follow(&mut machine, PATIENCE, |_| {}).with_context(|| format!("rund-rt {target}"))?;
        eprintln!("rund-rt {target}: {} s", begun.elapsed().as_secs());
    }
    Ok(())
}

fn pack(
    system: &System,
    package: &Package,
    test: &Path,
    programs: &[PathBuf],
) -> Result<NamedTempFile> {
    let directory = tempfile::Builder::new().prefix("carlsbad-vm-").tempdir()?;
    let root = directory.path();
    for name in [
        "bin", "dev", "proc", "sys", "tmp", "usr/bin", "etc", "guests",
    ] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy(&system.busybox, root.join("bin/busybox"))?;
    fs::copy(&system.busybox, root.join("usr/bin/busybox"))?;
    copy_with_libraries(test, "/test", root)?;
    // Tests start the crate's own programs by the paths that they were built at.
    for program in programs {
        let name = program.to_str().context("a path that is no text")?;
        if let Some(folder) = root.join(name.trim_start_matches('/')).parent() {
            fs::create_dir_all(folder)?;
        }
        copy_with_libraries(program, name, root)?;
    }
    guests(package, &root.join("guests"))?;
    system.pack_modules(root, &MODULES)?;
    fs::write(root.join("init"), include_str!("rund_rt.init.sh"))?;
    make_executable(&root.join("init"))?;
    archive(root)
}

/// Makes the static programs that tests run as guests.
fn guests(package: &Package, into: &Path) -> Result<()> {
    let sources = package.folder().join("tests/guests");
    for source in fs::read_dir(sources)? {
        let source = source?.path();
        let name = source.file_stem().context("a source without a name")?;
        let program = into.join(name);
        let made = match source.extension().and_then(|kind| kind.to_str()) {
            Some("c") => Command::new("cc")
                .args(["-static", "-O2", "-o"])
                .arg(&program)
                .arg(&source)
                .status(),
            Some("rs") => Command::new("rustc")
                .args(["--edition", "2024", "-O"])
                .args(["-C", "target-feature=+crt-static", "-o"])
                .arg(&program)
                .arg(&source)
                .status(),
            _ => continue,
        }?;
        ensure!(made.success(), "no guest of {}", source.display());
        shell::output(Command::new("strip").arg(&program))?;
    }
    Ok(())
}
