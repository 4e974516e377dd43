//! `cargo xtask rund-kernel`: a condensed kernel for the guests of `rund-rt`, built from the
//! distribution's source, and measured beside its kernel for virtual machines.

mod build;
mod measure;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use carlsbad_kit::capability::Capability;
use serde::Serialize;

use self::build::Kernel;
use self::measure::Measured;
use crate::vm;

/// Arguments of `cargo xtask rund-kernel`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// More settings, a line of CONFIG_NAME=value each, behind those of the condensed kernel.
    #[arg(long, value_name = "FILE")]
    fragment: Option<PathBuf>,
    /// How many files are compiled at once.
    #[arg(long, short, default_value_t = 2)]
    jobs: u32,
    /// Build it, and do not measure it.
    #[arg(long)]
    build_only: bool,
    /// How often each kernel is booted for the report, after once for nothing.
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

/// What stands in the report.
#[derive(Debug, Serialize)]
struct Report {
    condensed: Measured,
    distribution: Measured,
    /// Of the distribution's over ours.
    boot_ratio: f64,
    memory_ratio: f64,
    image_ratio: f64,
    rounds: usize,
    seconds_to_build: Option<u64>,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let built = Kernel::get(arguments.fragment.as_deref(), arguments.jobs.max(1))?;
    eprintln!("{}", built.elf().display());
    if arguments.build_only {
        return Ok(());
    }
    if let carlsbad_kit::capability::State::Missing(why) = Capability::Qemu.state() {
        bail!("{why}: {}", Capability::Qemu.fix());
    }
    let (theirs, busybox) = vm::images()?;
    let report = report(&built, &theirs, &busybox, arguments.rounds.max(1))?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        show(&report);
    }
    Ok(())
}

fn report(built: &Kernel, theirs: &Path, busybox: &Path, rounds: usize) -> Result<Report> {
    let initramfs = measure::initramfs(busybox)?;
    let (mut ours, mut rival) = (
        Measured::of("condensed", &built.image(), built.elf())?,
        Measured::of("the distribution's cloud kernel", theirs, theirs.to_owned())?,
    );
    for round in 0..=rounds {
        eprintln!("boot {round} of {rounds}");
        // Who goes first alternates; the first of all is for nothing.
        let mut both = [&mut ours, &mut rival];
        if round % 2 == 1 {
            both.reverse();
        }
        for kernel in both {
            kernel.boot(initramfs.path(), round > 0)?;
        }
    }
    for kernel in [&mut ours, &mut rival] {
        kernel.settle();
    }
    Ok(Report {
        boot_ratio: rival.boot_ms / ours.boot_ms,
        memory_ratio: rival.memory_kib / ours.memory_kib,
        image_ratio: rival.image_bytes as f64 / ours.image_bytes as f64,
        condensed: ours,
        distribution: rival,
        rounds,
        seconds_to_build: built.seconds,
    })
}

fn show(report: &Report) {
    let kernels = [&report.condensed, &report.distribution];
    let row = |what: &str, value: &dyn Fn(&Measured) -> String, ratio: f64| {
        println!(
            "{what:<34} {:>14} {:>14} {ratio:>7.1}x",
            value(kernels[0]),
            value(kernels[1])
        );
    };
    println!("{:<34} {:>14} {:>14}", "", "condensed", "distribution's");
    let kib = |bytes: u64| format!("{} KiB", bytes / 1024);
    row(
        "image, compressed",
        &|kernel| kib(kernel.image_bytes),
        report.image_ratio,
    );
    row(
        "from QEMU's start to the first program",
        &|kernel| format!("{:.0} ms", kernel.boot_ms),
        report.boot_ratio,
    );
    row(
        "guest memory in use, of 128 MiB",
        &|kernel| format!("{:.0} KiB", kernel.memory_kib),
        report.memory_ratio,
    );
    println!(
        "medians of {} boots each, taken in turn, emulated (TCG), one processor; memory is MemTotal \
         less MemAvailable, and what of the 128 MiB is not in MemTotal",
        report.rounds
    );
    if let Some(seconds) = report.seconds_to_build {
        println!("built in {seconds} s");
    }
}
