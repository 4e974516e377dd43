//! The hot paths, by criterion: a clone from start to end, and the loader.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod common;

use carlsbad_kit::capability::Capability;
use criterion::{BatchSize, Criterion};
use rund_rt::{CloneSpec, Reuse, Stdin, TemplateSpec};

use common::{PATIENCE, Serve, runtime};

fn main() {
    rund_rt::init();
    let mut criterion = Criterion::default().configure_from_args();
    if !Capability::Kvm.or_skip() {
        return;
    }
    let serve = Serve::new();
    let runtime = runtime();
    let template = serve.template(&runtime);
    for (name, reuse) in [
        ("clone, reset", Reuse::Reset),
        ("clone, fresh", Reuse::Fresh),
    ] {
        criterion.bench_function(name, |bencher| {
            bencher.iter_batched(
                || {
                    CloneSpec::new()
                        .stdin(Stdin::Bytes(b"1\n".to_vec()))
                        .reuse(reuse)
                },
                |spec| {
                    runtime
                        .start(&template, spec)
                        .unwrap()
                        .wait(PATIENCE)
                        .unwrap()
                },
                BatchSize::SmallInput,
            );
        });
    }
    criterion.bench_function("template", |bencher| {
        bencher.iter(|| runtime.prepare(&TemplateSpec::new(&serve.program)).unwrap());
    });
    criterion.final_summary();
}
