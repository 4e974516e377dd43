//! Machines with emulated CXL devices, for `directcxl`'s tests on a real kernel.
//!
//! Persistent memory on the distribution's QEMU and kernel; volatile memory, which both are too old
//! for, on those of its backports, unpacked in the cache beside the system's.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tempfile::NamedTempFile;

use super::follow::follow;
use super::system::System;
use super::{archive, build, build_example, copy_with_libraries, make_executable};
use crate::workspace::Package;

/// The test target that has a test for each machine.
const TARGET: &str = "cxl_vm";
/// The example that a test runs on whatever memory there is.
const PROGRAM: &str = "key_value";
/// The package that depends on the newest kernel with all drivers.
const KERNEL: &str = "linux-image-amd64";
const NEWER_KERNEL: &str = "linux-image-cloud-amd64";
/// In the order in which they have to be loaded; what a kernel has built in is not a module.
const MODULES: [&str; 12] = [
    "cxl_acpi",
    "cxl_pci",
    "cxl_port",
    "cxl_mem",
    "nfit",
    "cxl_pmem",
    "nd_pmem",
    "dax_pmem",
    "dax_cxl",
    "device_dax",
    "shpchp",
    "pciehp",
];
/// How long a machine may run.
const PATIENCE: Duration = Duration::from_secs(300);
const WINDOW: &str = "q35,cxl=on,cxl-fmw.0.targets.0=cxl.1,cxl-fmw.0.size=4G";
/// What a test tells when it wants a device unplugged.
const UNPLUG: &str = "@carlsbad unplug";

/// Runs every machine; with `only`, those whose name contains it.
pub(super) fn run(package: &Package, only: &[String]) -> Result<()> {
    let programs = [build(package, TARGET)?, build_example(package, PROGRAM)?];
    let wanted = |name: &str| only.is_empty() || only.iter().any(|only| name.contains(only));
    let files = tempfile::Builder::new().prefix("carlsbad-cxl-").tempdir()?;
    if wanted("pmem") {
        let system = System::distribution(KERNEL)?;
        let disks = ["pmem", "label"].map(|name| files.path().join(name));
        for test in [
            "persistent_memory_becomes_a_pool",
            "persistent_memory_is_a_pool_after_a_restart",
        ] {
            let mut machine = boot(&system, &programs, test, &pmem(&disks), None)?;
            machine.finish()?;
        }
    }
    if wanted("switch") {
        let system = System::backports(NEWER_KERNEL)?;
        let test = "two_devices_behind_a_switch_interleave_and_one_is_unplugged";
        let control = files.path().join("control");
        let mut machine = boot(&system, &programs, test, &switch(), Some(&control))?;
        machine.finish()?;
    }
    if wanted("hosts") {
        let system = System::backports(NEWER_KERNEL)?;
        let shared = files.path().join("shared");
        let mut hosts = Vec::new();
        for test in [
            "host_zero_writes_and_follows",
            "host_one_reads_and_takes_over",
        ] {
            hosts.push(boot(&system, &programs, test, &volatile(&shared), None)?);
        }
        for mut host in hosts {
            host.finish()?;
        }
    }
    for (name, test) in [
        (
            "program",
            "one_program_uses_a_file_and_huge_pages_and_a_device",
        ),
        (
            "poison",
            "a_poisoned_page_is_an_error_and_its_neighbours_are_read",
        ),
    ] {
        if wanted(name) {
            let system = System::backports(NEWER_KERNEL)?;
            let memory = files.path().join(name);
            boot(&system, &programs, test, &volatile(&memory), None)?.finish()?;
        }
    }
    Ok(())
}

fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Two root ports: with one, reads of the memory come back zero.
const PORTS: &str = "-device pxb-cxl,bus_nr=12,bus=pcie.0,id=cxl.1 \
                     -device cxl-rp,port=0,bus=cxl.1,id=rp0,chassis=0,slot=2 \
                     -device cxl-rp,port=1,bus=cxl.1,id=rp1,chassis=0,slot=3";

/// With a serial number: without one the cookie of the set is 0, and labels are not found again.
fn pmem([memory, label]: &[PathBuf; 2]) -> Vec<String> {
    words(&format!(
        "-object memory-backend-file,id=mem0,share=on,mem-path={},size=256M \
         -object memory-backend-file,id=lsa0,share=on,mem-path={},size=1M {PORTS} \
         -device cxl-type3,bus=rp0,memdev=mem0,lsa=lsa0,id=type3,sn=0x1",
        memory.display(),
        label.display()
    ))
}

fn switch() -> Vec<String> {
    words(&format!(
        "-object memory-backend-ram,id=mem0,share=on,size=256M \
         -object memory-backend-ram,id=mem1,share=on,size=256M {PORTS} \
         -device cxl-upstream,bus=rp0,id=us0 \
         -device cxl-downstream,port=0,bus=us0,id=sp0,chassis=0,slot=4 \
         -device cxl-downstream,port=1,bus=us0,id=sp1,chassis=0,slot=5 \
         -device cxl-type3,bus=sp0,volatile-memdev=mem0,id=type3,sn=0x1 \
         -device cxl-type3,bus=sp1,volatile-memdev=mem1,id=other,sn=0x2"
    ))
}

fn volatile(shared: &Path) -> Vec<String> {
    words(&format!(
        "-object memory-backend-file,id=mem0,share=on,mem-path={},size=256M {PORTS} \
         -device cxl-type3,bus=rp0,volatile-memdev=mem0,id=type3,sn=0x1",
        shared.display()
    ))
}

/// Starts a machine that runs one test.
fn boot(
    system: &System,
    programs: &[PathBuf; 2],
    test: &'static str,
    devices: &[String],
    control: Option<&Path>,
) -> Result<Machine> {
    let initramfs = pack(system, programs)?;
    let mut qemu = system.machine(initramfs.path(), &format!("carlsbad={test}"));
    // The kernel does not believe a hypervisor that its caches can be flushed.
    qemu.args(["-M", WINDOW, "-cpu", "max,hypervisor=off"])
        .args(["-m", "1G,maxmem=8G,slots=4"])
        .args(devices);
    if let Some(control) = control {
        let socket = format!("unix:{},server=on,wait=off", control.display());
        qemu.args(["-qmp", &socket]);
    }
    eprintln!("directcxl {test} on {}", system.release);
    let process = qemu.spawn().context("cannot start QEMU")?;
    Ok(Machine {
        process,
        test,
        control: control.map(Path::to_owned),
        begun: Instant::now(),
        _initramfs: initramfs,
    })
}

fn pack(system: &System, [binary, program]: &[PathBuf; 2]) -> Result<NamedTempFile> {
    let directory = tempfile::Builder::new().prefix("carlsbad-vm-").tempdir()?;
    let root = directory.path();
    for name in [
        "bin", "dev", "proc", "sys", "tmp", "run", "usr/bin", "modules", "etc",
    ] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy(&system.busybox, root.join("bin/busybox"))?;
    copy_with_libraries(binary, "/test", root)?;
    copy_with_libraries(program, &format!("/usr/bin/{PROGRAM}"), root)?;
    copy_with_libraries(Path::new("/usr/bin/ndctl"), "/usr/bin/ndctl", root)
        .context("apt install ndctl")?;
    system.pack_modules(root, &MODULES)?;
    fs::write(root.join("init"), include_str!("directcxl.init.sh"))?;
    make_executable(&root.join("init"))?;
    archive(root)
}

/// A machine that runs one test.
struct Machine {
    process: Child,
    test: &'static str,
    control: Option<PathBuf>,
    begun: Instant,
    _initramfs: NamedTempFile,
}

impl Machine {
    /// Reads to the machine's end.
    fn finish(&mut self) -> Result<()> {
        let patience = PATIENCE.saturating_sub(self.begun.elapsed());
        let mut unplugged = Ok(());
        let control = self.control.clone();
        let result = follow(&mut self.process, patience, |line| {
            if line.contains(UNPLUG) {
                unplugged = unplug(control.as_deref());
            }
        });
        unplugged?;
        result.with_context(|| format!("directcxl {}", self.test))?;
        eprintln!(
            "directcxl {}: {} s",
            self.test,
            self.begun.elapsed().as_secs()
        );
        Ok(())
    }
}

/// Unplugs the first device.
fn unplug(control: Option<&Path>) -> Result<()> {
    let control = control.context("no control socket")?;
    let mut monitor = UnixStream::connect(control)?;
    monitor.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut answers = BufReader::new(monitor.try_clone()?).lines();
    // Its greeting; then an answer to each command, without which the next may be lost.
    answers.next().context("no greeting")??;
    for command in [
        r#"{"execute":"qmp_capabilities"}"#,
        r#"{"execute":"device_del","arguments":{"id":"type3"}}"#,
    ] {
        writeln!(monitor, "{command}")?;
        let answer = answers.next().context("no answer")??;
        ensure!(answer.contains("return"), "{command}: {answer}");
    }
    Ok(())
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _already_off = self.process.kill();
        let _nobody_waits = self.process.wait();
    }
}
