//! Figure 4b: a Linux guest of QEMU cloned from a template, beside the same guest booted.
#![allow(
    clippy::unwrap_used,
    reason = "a bench says what went wrong by failing"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use carlsbad_kit::capability::{Capability, condensed_kernel, guest_kernel};
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{Interleaved, interleave, median};
use carlsbad_kit::scratch;
use carlsbad_types::ByteSize;
use rund_rt::{Backend, CloneSpec, Instance, Qemu, TemplateSpec, qemu_initramfs};

const BUSYBOX: &str = "/bin/busybox";

fn main() {
    let figure = Figure::new(
        "rund-rt/4b",
        "a Linux guest of QEMU from its template to its first output",
        "ms",
    );
    if !Capability::Qemu.is_present() || !Path::new(BUSYBOX).exists() {
        return figure.without(Capability::Qemu).emit().unwrap();
    }
    let Some(kernel) = guest_kernel() else {
        return figure.without(Capability::GuestKernel).emit().unwrap();
    };
    let dir = scratch::on_disk().unwrap();
    let initramfs = dir.path().join("initramfs");
    fs::write(&initramfs, qemu_initramfs(Path::new(BUSYBOX), &[]).unwrap()).unwrap();
    let rounds = if is_quick() { (0, 1) } else { (1, 7) };
    let qemu = Qemu::new();
    let found = qemu.probe().unwrap();
    let theirs = measure(&qemu, kernel, &initramfs, rounds);
    let condensed = condensed_kernel().map(|kernel| measure(&qemu, kernel, &initramfs, rounds));
    let condensed = condensed.map_or_else(String::new, |condensed| {
        format!(
            "; of the condensed kernel {:.0} ms beside {:.0} ms, {:.1}x",
            median(&condensed.samples.ours),
            median(&condensed.samples.rival),
            1.0 / condensed.samples.ratio(),
        )
    });
    let note = format!(
        "{}, {}, Debian's cloud kernel, 128 MiB, busybox init; until it has said its name and is \
         gone; running again after {:.0} ms; made ahead, {:.0} ms{condensed}",
        found.isolation,
        found.details.join(", "),
        median(&theirs.started),
        median(&theirs.ahead),
    );
    figure
        .against("a cold boot of the same guest", theirs.samples)
        .note(note)
        .emit()
        .unwrap();
}

struct Measured {
    samples: Interleaved,
    /// Until a clone ran again, in ms.
    started: Vec<f64>,
    /// The same as the samples, of clones that were made ahead.
    ahead: Vec<f64>,
}

/// From the request to the end of a guest that says its name: cloned, and booted.
fn measure(
    qemu: &Qemu,
    kernel: PathBuf,
    initramfs: &Path,
    (warm_up, rounds): (usize, usize),
) -> Measured {
    let mut spec = TemplateSpec::new(kernel).memory(ByteSize::mib(128));
    spec.initramfs = Some(initramfs.to_owned());
    spec.env = vec!["PATH=/bin".into()];
    let template = qemu.build_template(&spec).unwrap();
    let command = || CloneSpec::new().args(["sh", "-c", "hostname"]).id("guest");
    let finish = |start: Instant, guest: Box<dyn Instance>| {
        let exit = guest.wait(Some(Duration::from_secs(300))).unwrap();
        assert_eq!(exit.stdout, b"guest\n");
        start.elapsed().as_secs_f64() * 1e3
    };
    let mut started = Vec::new();
    let samples = interleave(
        warm_up,
        rounds,
        || {
            let start = Instant::now();
            let guest = qemu.clone_from(&template, command()).unwrap();
            started.push(start.elapsed().as_secs_f64() * 1e3);
            finish(start, guest)
        },
        || {
            let start = Instant::now();
            finish(start, qemu.cold_boot(&spec, command()).unwrap())
        },
    );
    let ahead = (0..rounds)
        .map(|_| {
            qemu.prewarm(&template, 1).unwrap();
            let start = Instant::now();
            finish(start, qemu.clone_from(&template, command()).unwrap())
        })
        .collect();
    Measured {
        samples,
        started,
        ahead,
    }
}
