//! Figure 4b: a Linux guest of QEMU cloned from a template, beside the same guest booted.
#![allow(
    clippy::unwrap_used,
    reason = "a bench says what went wrong by failing"
)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use carlsbad_kit::capability::{Capability, guest_kernel};
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
    let mut spec = TemplateSpec::new(kernel).memory(ByteSize::mib(128));
    spec.initramfs = Some(initramfs);
    spec.env = vec!["PATH=/bin".into()];

    let qemu = Qemu::new();
    let found = qemu.probe().unwrap();
    let template = qemu.build_template(&spec).unwrap();
    let command = || CloneSpec::new().args(["sh", "-c", "hostname"]).id("guest");
    // From the request to the end of a guest that says its name: the clone's start alone is in the
    // note.
    let mut started = Vec::new();
    let mut timed = |begin: &dyn Fn() -> Box<dyn Instance>, is_clone: bool| {
        let start = Instant::now();
        let guest = begin();
        if is_clone {
            started.push(start.elapsed().as_secs_f64() * 1e3);
        }
        let exit = guest.wait(Some(Duration::from_secs(300))).unwrap();
        assert_eq!(exit.stdout, b"guest\n");
        start.elapsed().as_secs_f64() * 1e3
    };
    let clone = || qemu.clone_from(&template, command()).unwrap();
    let boot = || qemu.cold_boot(&spec, command()).unwrap();
    let (warm_up, rounds) = if is_quick() { (0, 1) } else { (1, 7) };
    let timed = std::cell::RefCell::new(&mut timed);
    let samples: Interleaved = interleave(
        warm_up,
        rounds,
        || (timed.borrow_mut())(&clone, true),
        || (timed.borrow_mut())(&boot, false),
    );
    let note = format!(
        "{}, {}, Debian's cloud kernel, 128 MiB, busybox init; until it has said its name and is \
         gone; running again after {:.0} ms",
        found.isolation,
        found.details.join(", "),
        median(&started),
    );
    figure
        .against("a cold boot of the same guest", samples)
        .note(note)
        .emit()
        .unwrap();
}
