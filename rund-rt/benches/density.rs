//! Figures 2 to 2c: what a sandbox holds.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod common;

use std::io::{BufRead, BufReader, Write};

use carlsbad_kit::capability::Capability;
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::memory::{MemoryUse, available};
use rund_rt::{CloneSpec, Output, Stdin};

use common::{Serve, runtime};

fn main() {
    rund_rt::init();
    let figures = || {
        [
            ("2", "density: PSS of the whole sandbox, its monitor included, minus deliberately dirtied bytes", "KiB"),
            ("2b", "density: MemAvailable for each sandbox", "MiB"),
            ("2c", "density: sandboxes alive on 24 GiB", "sandboxes"),
        ]
        .map(|(id, what, unit)| Figure::new(format!("rund-rt/{id}"), what, unit))
    };
    if !Capability::Kvm.is_present() {
        for figure in figures() {
            figure.without(Capability::Kvm).emit().unwrap();
        }
        return;
    }
    let number = if is_quick() { 20 } else { 2500 };
    let serve = Serve::new();
    let runtime = runtime();
    let template = serve.template(&runtime);
    // Each has two pipes of the owner's.
    let most = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, hard) = nix::sys::resource::getrlimit(most).unwrap();
    nix::sys::resource::setrlimit(most, hard, hard).unwrap();
    let before = available().unwrap().get() as f64;
    let mut alive = Vec::new();
    for i in 0..number {
        let spec = CloneSpec::new().stdin(Stdin::Piped).stdout(Output::Piped);
        let sandbox = runtime.start(&template, spec).unwrap();
        let mut input = sandbox.take_stdin().unwrap();
        let mut output = BufReader::with_capacity(128, sandbox.take_stdout().unwrap());
        input.write_all(format!("{i}\n").as_bytes()).unwrap();
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert!(line.starts_with(&format!("motto {i} ")), "{line}");
        alive.push((sandbox, input, output));
    }
    let after = available().unwrap().get() as f64;
    // All of them still answer.
    for (i, (_, input, output)) in alive.iter_mut().enumerate() {
        input.write_all(format!("again {i}\n").as_bytes()).unwrap();
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        assert!(line.starts_with(&format!("motto again {i} ")), "{line}");
    }
    let step = (number / 100).max(1);
    let pss: Vec<f64> = alive
        .iter()
        .step_by(step)
        .map(|(sandbox, ..)| {
            let used = MemoryUse::of(sandbox.pid().unwrap()).unwrap();
            used.pss.get() as f64 / 1024.0
        })
        .collect();
    let [whole, available, count] = figures();
    let note = format!(
        "kvm-elf, {}; {number} alive, each has answered twice; nothing was dirtied deliberately",
        runtime.capabilities().isolation
    );
    whole.samples(pss).note(note.clone()).emit().unwrap();
    available
        .samples([(before - after) / f64::from(1 << 20) / number as f64])
        .note(note.clone())
        .emit()
        .unwrap();
    count.samples([number as f64]).note(note).emit().unwrap();
}
