//! Machines with emulated CXL devices, for `directcxl`'s tests on a real kernel.
//!
//! Persistent memory on the distribution's QEMU and kernel; volatile memory, which both are too old
//! for, on those of its backports, unpacked in the cache beside the system's.

use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use carlsbad_kit::capability::cache_dir;
use tempfile::{NamedTempFile, TempDir};

use super::{
    BUSYBOX, RESULT, archive, build, build_example, copy_with_libraries, make_executable, unpack,
};
use crate::shell;
use crate::workspace::Package;

/// The test target that has a test for each machine.
const TARGET: &str = "cxl_vm";
/// The example that a test runs on whatever memory there is.
const PROGRAM: &str = "key_value";
/// The package that depends on the newest kernel with all drivers.
const KERNEL: &str = "linux-image-amd64";
const NEWER_KERNEL: &str = "linux-image-cloud-amd64";
const BACKPORTS: &str = "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] \
                         http://deb.debian.org/debian bookworm-backports main\n";
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
        let system = System::distribution()?;
        let disks = ["pmem", "label"].map(|name| files.path().join(name));
        for test in [
            "persistent_memory_becomes_a_pool",
            "persistent_memory_is_a_pool_after_a_restart",
        ] {
            let mut machine = system.boot(&programs, test, &pmem(&disks), None)?;
            machine.finish()?;
        }
    }
    if wanted("switch") {
        let system = System::backports()?;
        let test = "two_devices_behind_a_switch_interleave_and_one_is_unplugged";
        let control = files.path().join("control");
        let mut machine = system.boot(&programs, test, &switch(), Some(&control))?;
        machine.finish()?;
    }
    if wanted("hosts") {
        let system = System::backports()?;
        let shared = files.path().join("shared");
        let mut hosts = Vec::new();
        for test in [
            "host_zero_writes_and_follows",
            "host_one_reads_and_takes_over",
        ] {
            hosts.push(system.boot(&programs, test, &volatile(&shared), None)?);
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
            let system = System::backports()?;
            let memory = files.path().join(name);
            system
                .boot(&programs, test, &volatile(&memory), None)?
                .finish()?;
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

/// An emulator and a kernel.
struct System {
    qemu: Command,
    /// Where the kernel's package is unpacked.
    kernel: PathBuf,
    release: String,
    busybox: PathBuf,
}

impl System {
    fn distribution() -> Result<Self> {
        let cache = cache_dir().join("vm");
        let package = newest(&[], KERNEL)?;
        Self::of(
            Command::new("qemu-system-x86_64"),
            unpack(&cache, &package)?,
            &package,
        )
    }

    fn backports() -> Result<Self> {
        let cache = cache_dir().join("vm");
        let apt = cache.join("backports");
        fs::create_dir_all(apt.join("lists/partial"))?;
        let sources = apt.join("sources.list");
        fs::write(&sources, BACKPORTS)?;
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
        let package = newest(&options, NEWER_KERNEL)?;
        let kernel = fetch(&apt, &options, &[&package])?;
        let emulator = ["qemu-system-x86", "qemu-system-common", "qemu-system-data"];
        let emulator = fetch(&apt, &options, &emulator)?;
        let mut qemu = Command::new(emulator.join("usr/bin/qemu-system-x86_64"));
        qemu.arg("-L").arg(emulator.join("usr/share/qemu"));
        // The first firmware is of a package that does not change with the emulator.
        qemu.args(["-L", "/usr/share/seabios"]);
        Self::of(qemu, kernel, &package)
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

    /// Starts a machine that runs one test.
    fn boot(
        &self,
        programs: &[PathBuf; 2],
        test: &'static str,
        devices: &[String],
        control: Option<&Path>,
    ) -> Result<Machine> {
        let initramfs = self.pack(programs)?;
        let mut qemu = Command::new(self.qemu.get_program());
        qemu.args(self.qemu.get_args())
            .args(["-M", WINDOW, "-accel", "tcg,thread=multi"])
            // The kernel does not believe a hypervisor that its caches can be flushed.
            .args(["-cpu", "max,hypervisor=off", "-smp", "2"])
            .args(["-m", "1G,maxmem=8G,slots=4"])
            .args(["-nographic", "-nodefaults", "-no-user-config", "-no-reboot"])
            .args(["-serial", "stdio"])
            .arg("-kernel")
            .arg(self.kernel.join(format!("boot/vmlinuz-{}", self.release)))
            .arg("-initrd")
            .arg(initramfs.path())
            .arg("-append")
            .arg(format!(
                // Emulated on a busy machine, the timer is late for the kernel's check of it.
                "console=ttyS0 quiet panic=-1 random.trust_cpu=on no_timer_check carlsbad={test}"
            ))
            .args(devices);
        if let Some(control) = control {
            let socket = format!("unix:{},server=on,wait=off", control.display());
            qemu.args(["-qmp", &socket]);
        }
        eprintln!("directcxl {test} on {}", self.release);
        let process = qemu
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start QEMU")?;
        Ok(Machine {
            process,
            test,
            control: control.map(Path::to_owned),
            begun: Instant::now(),
            _initramfs: initramfs,
        })
    }

    fn pack(&self, [binary, program]: &[PathBuf; 2]) -> Result<NamedTempFile> {
        let directory = tempfile::Builder::new().prefix("carlsbad-vm-").tempdir()?;
        let root = directory.path();
        for name in [
            "bin", "dev", "proc", "sys", "tmp", "run", "usr/bin", "modules", "etc",
        ] {
            fs::create_dir_all(root.join(name))?;
        }
        fs::copy(&self.busybox, root.join("bin/busybox"))?;
        copy_with_libraries(binary, "/test", root)?;
        copy_with_libraries(program, &format!("/usr/bin/{PROGRAM}"), root)?;
        copy_with_libraries(Path::new("/usr/bin/ndctl"), "/usr/bin/ndctl", root)
            .context("apt install ndctl")?;
        self.pack_modules(root)?;
        fs::write(root.join("init"), include_str!("directcxl.init.sh"))?;
        make_executable(&root.join("init"))?;
        archive(root)
    }

    /// Puts the drivers and what they need into `root`, with a list in the order of loading.
    fn pack_modules(&self, root: &Path) -> Result<()> {
        let modules = self.kernel.join("lib/modules").join(&self.release);
        if !modules.join("modules.dep").exists() {
            shell::output(
                Command::new("depmod")
                    .arg("-b")
                    .arg(&self.kernel)
                    .arg(&self.release),
            )
            .context("apt install kmod")?;
        }
        let (mut seen, mut list) = (BTreeSet::new(), String::new());
        for module in MODULES {
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
fn fetch(apt: &Path, options: &[String], packages: &[&str]) -> Result<PathBuf> {
    let root = apt.join(packages.first().context("no packages")?);
    if root.exists() {
        return Ok(root);
    }
    let scratch: TempDir = tempfile::Builder::new().tempdir_in(apt)?;
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
        let output = self.process.stdout.take().context("no output")?;
        let (sender, lines) = std::sync::mpsc::channel();
        // Reads until the machine is off, and is joined there.
        let reader = std::thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n') {
                let Ok(line) = line else { return };
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let deadline = self.begun + PATIENCE;
        let mut result = None;
        let mut unplugged = Ok(());
        while let Ok(line) = lines.recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            println!("    {line}");
            if line.contains(UNPLUG) {
                unplugged = self.unplug();
            }
            if let Some((_, status)) = line.split_once(RESULT) {
                result = Some(status.trim().to_owned());
            }
        }
        let _already_off = self.process.kill();
        self.process.wait()?;
        let _panicked = reader.join();
        unplugged?;
        let took = self.begun.elapsed().as_secs();
        match result.as_deref() {
            Some("0") => eprintln!("directcxl {}: {took} s", self.test),
            Some(status) => bail!("{}: the test ended with status {status}", self.test),
            None => bail!("{}: no result within {} s", self.test, PATIENCE.as_secs()),
        }
        Ok(())
    }

    /// Unplugs the first device.
    fn unplug(&self) -> Result<()> {
        let control = self.control.as_ref().context("no control socket")?;
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
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _already_off = self.process.kill();
        let _nobody_waits = self.process.wait();
    }
}
