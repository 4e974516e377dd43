//! A machine with an RDMA device that its kernel emulates (soft RoCE), for `krcore`'s fabric `verbs`.
//!
//! The kernel is that of the backports with all drivers; two ends of a virtual cable, and the device on
//! one of them. On that of the distribution itself (6.1) some runs stalled with many requests under way;
//! on 6.12 none has.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tempfile::NamedTempFile;

use super::follow::follow;
use super::system::System;
use super::{archive, build, build_bench, copy_with_libraries, make_executable};
use crate::workspace::Package;

/// The package that depends on the newest kernel with all drivers, of the backports.
const KERNEL: &str = "linux-image-amd64";
/// In the order in which they have to be loaded.
const MODULES: [&str; 13] = [
    "configfs",
    "crc32_generic",
    "ip6_udp_tunnel",
    "udp_tunnel",
    "ib_core",
    "ib_uverbs",
    "rdma_rxe",
    "ib_cm",
    "iw_cm",
    "rdma_cm",
    "rdma_ucm",
    "veth",
    "dummy",
];
/// Test targets that run there, with a word for the kernel: of those that are shared with other
/// fabrics, what runs on this one.
const TARGETS: [(&str, &str); 3] = [
    ("verbs", ""),
    ("queues", "carlsbad=shared"),
    ("isolation", "carlsbad=shared"),
];
/// libibverbs' driver of soft RoCE, and what names it.
const DRIVER: &str = "/usr/lib/x86_64-linux-gnu/libibverbs/librxe-rdmav34.so";
const DRIVERS: &str = "/etc/libibverbs.d/rxe.driver";
/// Busybox has no `rdma`, and its `ip` knows no virtual cables.
const TOOLS: [&str; 2] = ["/usr/bin/ip", "/usr/bin/rdma"];
/// How long a machine may run.
const PATIENCE: Duration = Duration::from_secs(600);

/// Runs every test target in a machine of its own; with `only`, those of these names.
pub(super) fn run(package: &Package, only: &[String]) -> Result<()> {
    for (target, words) in TARGETS {
        if only.is_empty() || only.iter().any(|name| name == target) {
            boot(package, target, &build(package, target)?, words)?;
        }
    }
    Ok(())
}

/// What a line begins with that is a figure.
const FIGURE: &str = "@carlsbad figure ";

/// Runs a bench target there; puts the figures that it measures into `samples`.
pub(crate) fn measure(package: &Package, bench: &str, samples: &Path) -> Result<()> {
    let program = build_bench(package, bench)?;
    let figures = boot(package, bench, &program, "carlsbad=figures")?;
    fs::write(samples, figures.join("\n"))?;
    Ok(())
}

/// Runs one program; gives the figures that it has measured.
fn boot(package: &Package, name: &str, program: &Path, words: &str) -> Result<Vec<String>> {
    let system = System::backports(KERNEL)?;
    let initramfs = pack(&system, program)?;
    let begun = Instant::now();
    let what = format!("{} {name}", package.name);
    eprintln!("{what} on {}, soft RoCE", system.release);
    let mut machine = system
        .machine(initramfs.path(), words)
        .args(["-M", "q35", "-cpu", "max", "-m", "1G", "-nic", "none"])
        .spawn()
        .context("cannot start QEMU")?;
    let mut figures = Vec::new();
    follow(&mut machine, PATIENCE, |line| {
        if let Some((_, figure)) = line.split_once(FIGURE) {
            figures.push(figure.to_owned());
        }
    })
    .context(what.clone())?;
    eprintln!("{what}: {} s", begun.elapsed().as_secs());
    Ok(figures)
}

fn pack(system: &System, test: &Path) -> Result<NamedTempFile> {
    let directory = tempfile::Builder::new().prefix("carlsbad-vm-").tempdir()?;
    let root = directory.path();
    for name in ["bin", "dev", "proc", "sys", "tmp", "usr/bin"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy(&system.busybox, root.join("bin/busybox"))?;
    copy_with_libraries(test, "/test", root)?;
    for (file, hint) in [
        (DRIVER, "apt install ibverbs-providers"),
        (DRIVERS, "apt install ibverbs-providers"),
        (TOOLS[0], "apt install iproute2"),
        (TOOLS[1], "apt install iproute2"),
    ] {
        if let Some(folder) = root.join(file.trim_start_matches('/')).parent() {
            fs::create_dir_all(folder)?;
        }
        if file == DRIVERS {
            fs::copy(file, root.join(file.trim_start_matches('/'))).context(hint)?;
        } else {
            copy_with_libraries(Path::new(file), file, root).context(hint)?;
        }
    }
    // Threads are cancelled by it, and it is loaded by name.
    let unwinder = Path::new("/lib/x86_64-linux-gnu/libgcc_s.so.1");
    copy_with_libraries(unwinder, "/lib/x86_64-linux-gnu/libgcc_s.so.1", root)?;
    system.pack_modules(root, &MODULES)?;
    fs::write(root.join("init"), include_str!("krcore.init.sh"))?;
    make_executable(&root.join("init"))?;
    archive(root)
}
