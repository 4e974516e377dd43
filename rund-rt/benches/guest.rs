//! Figures 5 to 5e: what the machine costs who is in it.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod common;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{interleave, quantile};
use rund_rt::{CloneSpec, Limits, Runtime, Status, Template, TemplateSpec};

use common::{PATIENCE, c_program, runtime};

fn said(out: &[u8]) -> f64 {
    String::from_utf8_lossy(out).trim().parse().unwrap()
}

/// What `measure` says in a sandbox.
fn inside(runtime: &Runtime, template: &Template, what: &str, n: usize) -> f64 {
    let args = ["measure".to_owned(), what.to_owned(), n.to_string()];
    let sandbox = runtime
        .start(template, CloneSpec::new().args(args))
        .unwrap();
    let exit = sandbox.wait(PATIENCE).unwrap();
    assert!(exit.status.success(), "{exit:?}");
    said(&exit.stdout)
}

fn native(program: &Path, what: &str, n: usize) -> f64 {
    let mut command = Command::new(program);
    said(
        &command
            .args([what, &n.to_string()])
            .output()
            .unwrap()
            .stdout,
    )
}

fn main() {
    rund_rt::init();
    let ids = [
        ("5", "a guest that only computes", "ms"),
        ("5b", "sha256sum of 64 MiB through the shim", "ms"),
        ("5c", "a system call that leaves the machine", "us"),
        ("5d", "a system call that is served by the shim", "us"),
        (
            "5e",
            "the watchdog: from the end of the time to the end of the sandbox, p99",
            "ms",
        ),
    ];
    let figure = |i: usize| {
        let (id, what, unit) = ids[i];
        Figure::new(format!("rund-rt/{id}"), what, unit)
    };
    for capability in [Capability::Kvm, Capability::Busybox] {
        if !capability.is_present() {
            for i in 0..ids.len() {
                figure(i).without(capability).emit().unwrap();
            }
            return;
        }
    }
    let quick = is_quick();
    let dir = carlsbad_kit::scratch::on_tmpfs().unwrap();
    let root = dir.path().join("root");
    std::fs::create_dir_all(root.join("data")).unwrap();
    let program = c_program(dir.path(), "measure");
    let runtime = runtime();
    let isolation = runtime.capabilities().isolation;
    let template = runtime.prepare(&TemplateSpec::new(&program)).unwrap();

    let n = if quick { 1 } else { 60 };
    let samples = interleave(
        1,
        if quick { 1 } else { 15 },
        || inside(&runtime, &template, "compute", n) / 1e6,
        || native(&program, "compute", n) / 1e6,
    );
    let note =
        format!("kvm-elf, {isolation}; integers and floating point over 4 MiB, timed inside");
    figure(0)
        .against("native", samples)
        .note(note)
        .emit()
        .unwrap();

    let size = if quick { 1 << 20 } else { 64 << 20 };
    let mut rng = carlsbad_kit::seed::Rng::with_seed(7);
    let bytes: Vec<u8> = std::iter::repeat_with(|| rng.u8(..)).take(size).collect();
    let file = root.join("data/big");
    std::fs::write(&file, bytes).unwrap();
    let busybox = TemplateSpec::new("/usr/bin/busybox").root(&root);
    let busybox = runtime.prepare(&busybox).unwrap();
    let expected = Command::new("/usr/bin/busybox")
        .arg("sha256sum")
        .arg(&file)
        .output()
        .unwrap();
    let samples = interleave(
        1,
        if quick { 1 } else { 11 },
        || {
            let began = Instant::now();
            let args = ["busybox", "sha256sum", "/data/big"];
            let sandbox = runtime
                .start(&busybox, CloneSpec::new().args(args))
                .unwrap();
            let exit = sandbox.wait(PATIENCE).unwrap();
            assert_eq!(exit.stdout[..64], expected.stdout[..64], "{exit:?}");
            began.elapsed().as_secs_f64() * 1e3
        },
        || {
            let began = Instant::now();
            let mut command = Command::new("/usr/bin/busybox");
            let out = command.arg("sha256sum").arg(&file).output().unwrap();
            assert_eq!(out.stdout, expected.stdout);
            began.elapsed().as_secs_f64() * 1e3
        },
    );
    let note = format!("kvm-elf, {isolation}; busybox, a file in the page cache, start included");
    figure(1)
        .against("native", samples)
        .note(note)
        .emit()
        .unwrap();

    for (i, what, n) in [(2, "exit", 10_000), (3, "inside", 100_000)] {
        let n = if quick { 100 } else { n };
        let rounds = if quick { 1 } else { 15 };
        let samples: Vec<f64> = (0..rounds)
            .map(|_| inside(&runtime, &template, what, n) / 1e3)
            .collect();
        let note = format!("kvm-elf, {isolation}; the mean of {n}, timed inside");
        figure(i).samples(samples).note(note).emit().unwrap();
    }

    let time = Duration::from_millis(20);
    let late: Vec<f64> = (0..if quick { 2 } else { 200 })
        .map(|_| {
            let mut limits = Limits::default();
            limits.run_time = Some(time);
            let args = ["measure", "compute", "1000000"];
            let spec = CloneSpec::new().args(args).limits(limits);
            let sandbox = runtime.start(&template, spec).unwrap();
            let exit = sandbox.wait(PATIENCE).unwrap();
            assert_eq!(exit.status, Status::TimedOut);
            (exit.stats.run.as_secs_f64() - time.as_secs_f64()) * 1e3
        })
        .collect();
    let note = format!(
        "kvm-elf, {isolation}; {} sandboxes in an infinite loop; p50 {:.3} ms",
        late.len(),
        quantile(&late, 0.5)
    );
    figure(4)
        .samples([quantile(&late, 0.99)])
        .note(note)
        .emit()
        .unwrap();
}
