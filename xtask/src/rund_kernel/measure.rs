//! Booting a kernel: how long it takes, and what memory it keeps for itself.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use carlsbad_kit::sample::median;
use serde::Serialize;
use tempfile::NamedTempFile;

use crate::vm;

/// Memory of the machine.
const MEMORY_KIB: f64 = 128.0 * 1024.0;
/// How long a boot may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// What is said before the two numbers.
const MARK: &str = "RUND-MEMORY ";
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
while read -r name value unit; do
    case "$name" in
        MemTotal:) total=$value ;;
        MemAvailable:) available=$value ;;
    esac
done < /proc/meminfo
echo "RUND-MEMORY $total $available"
/bin/busybox reboot -f
"#;

/// What a kernel costs: medians.
#[derive(Debug, Serialize)]
pub(super) struct Measured {
    name: &'static str,
    /// Its compressed image.
    pub(super) image_bytes: u64,
    /// From QEMU's start to the first line of its first program.
    pub(super) boot_ms: f64,
    /// What programs cannot have of the machine's memory.
    pub(super) memory_kib: f64,
    #[serde(skip)]
    boots: PathBuf,
    times: Vec<f64>,
    memories: Vec<f64>,
}

impl Measured {
    /// Of the compressed `image`; `boots` is what QEMU is given.
    pub(super) fn of(name: &'static str, image: &Path, boots: PathBuf) -> Result<Self> {
        Ok(Self {
            name,
            image_bytes: fs::metadata(image)
                .with_context(|| format!("cannot read {}", image.display()))?
                .len(),
            boot_ms: f64::NAN,
            memory_kib: f64::NAN,
            boots,
            times: Vec::new(),
            memories: Vec::new(),
        })
    }

    /// Boots it once; whether that counts.
    pub(super) fn boot(&mut self, initramfs: &Path, counts: bool) -> Result<()> {
        let begun = Instant::now();
        let mut machine = Command::new("timeout")
            .arg(PATIENCE.as_secs().to_string())
            .arg("qemu-system-x86_64")
            .args(["-M", "microvm,acpi=off", "-accel", "tcg", "-cpu", "max"])
            .args(["-m", "128M", "-nodefaults", "-no-user-config"])
            .args(["-nographic", "-no-reboot", "-serial", "stdio"])
            .arg("-kernel")
            .arg(&self.boots)
            .arg("-initrd")
            .arg(initramfs)
            .arg("-append")
            .arg("console=ttyS0,115200 quiet reboot=t panic=-1 random.trust_cpu=on")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("cannot start QEMU")?;
        let output = machine.stdout.take().context("no output")?;
        let mut found = None;
        for line in BufReader::new(output).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
            if let Some((_, numbers)) = line.split_once(MARK) {
                let took = begun.elapsed().as_secs_f64() * 1e3;
                let numbers: Vec<f64> = numbers
                    .split(' ')
                    .map(str::parse)
                    .collect::<Result<_, _>>()?;
                let [total, available] = numbers[..] else {
                    continue;
                };
                ensure!(total >= available, "the guest says {line}");
                found = Some((took, MEMORY_KIB - available));
            }
        }
        machine.wait()?;
        let (took, memory) =
            found.with_context(|| format!("{} did not boot", self.boots.display()))?;
        if counts {
            self.times.push(took);
            self.memories.push(memory);
        }
        Ok(())
    }

    /// After the last boot.
    pub(super) fn settle(&mut self) {
        self.boot_ms = median(&self.times);
        self.memory_kib = median(&self.memories);
    }
}

/// An initial file system that says what memory there is, and ends.
pub(super) fn initramfs(busybox: &Path) -> Result<NamedTempFile> {
    let directory = tempfile::Builder::new().prefix("carlsbad-vm-").tempdir()?;
    let root = directory.path();
    for name in ["bin", "dev", "proc"] {
        fs::create_dir_all(root.join(name))?;
    }
    fs::copy(busybox, root.join("bin/busybox"))?;
    fs::write(root.join("init"), INIT)?;
    vm::make_executable(&root.join("init"))?;
    vm::archive(root)
}
