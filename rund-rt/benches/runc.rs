//! Figure 4: end to end beside `runc run`.
#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench says what went wrong by failing"
)]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use carlsbad_kit::capability::Capability;
use carlsbad_kit::figure::{Figure, is_quick};
use carlsbad_kit::sample::{interleave, median};
use rund_rt::{CloneSpec, Runtime, Template, TemplateSpec};

use common::{PATIENCE, runtime};

const SCRIPT: &str = "cat /data/f; echo written > /tmp/f; cat /tmp/f";
const EXPECTED: &[u8] = b"read\nwritten\n";

/// A bundle that runs the script on the same root.
fn bundle(dir: &Path) {
    let mut runc = Command::new("runc");
    assert!(
        runc.arg("spec")
            .current_dir(dir)
            .status()
            .unwrap()
            .success()
    );
    let path = dir.join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
    config["process"]["terminal"] = false.into();
    config["process"]["args"] = serde_json::json!(["/bin/busybox", "sh", "-c", SCRIPT]);
    config["root"] = serde_json::json!({ "path": "root", "readonly": false });
    std::fs::write(path, config.to_string()).unwrap();
}

fn ours(runtime: &Runtime, template: &Template) -> f64 {
    let began = Instant::now();
    let args = ["busybox", "sh", "-c", SCRIPT];
    let sandbox = runtime
        .start(template, CloneSpec::new().args(args))
        .unwrap();
    let exit = sandbox.wait(PATIENCE).unwrap();
    assert_eq!(exit.stdout, EXPECTED, "{exit:?}");
    began.elapsed().as_secs_f64() * 1e3
}

fn runc(dir: &Path, i: usize) -> f64 {
    let began = Instant::now();
    let out = Command::new("runc")
        .args(["run", &format!("rund-bench-{}-{i}", std::process::id())])
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(out.stdout, EXPECTED, "{out:?}");
    began.elapsed().as_secs_f64() * 1e3
}

fn main() {
    rund_rt::init();
    let figure = || Figure::new("rund-rt/4", "end to end on the same root", "ms");
    for capability in [Capability::Kvm, Capability::Runc, Capability::Busybox] {
        if !capability.is_present() {
            figure().without(capability).emit().unwrap();
            return;
        }
    }
    let dir = carlsbad_kit::scratch::on_disk().unwrap();
    let root = dir.path().join("root");
    for name in ["bin", "data", "tmp", "dev", "proc", "sys"] {
        std::fs::create_dir_all(root.join(name)).unwrap();
    }
    std::fs::copy("/usr/bin/busybox", root.join("bin/busybox")).unwrap();
    for name in ["sh", "cat"] {
        std::os::unix::fs::symlink("busybox", root.join("bin").join(name)).unwrap();
    }
    std::fs::write(root.join("data/f"), "read\n").unwrap();
    bundle(dir.path());
    let runtime = runtime();
    let mut spec = TemplateSpec::new("/usr/bin/busybox")
        .root(&root)
        .env(["PATH=/bin"]);
    spec.inside = Some("/bin/busybox".into());
    let template = runtime.prepare(&spec).unwrap();
    // One is set back while the other serves.
    runtime.prewarm(&template, 2).unwrap();
    let mut i = 0;
    let samples = interleave(
        1,
        if is_quick() { 1 } else { 31 },
        || {
            median(&[
                ours(&runtime, &template),
                ours(&runtime, &template),
                ours(&runtime, &template),
            ])
        },
        || {
            i += 1;
            runc(dir.path(), i)
        },
    );
    figure()
        .against("runc run", samples)
        .note(format!(
            "kvm-elf, {}; two monitors held; a busybox shell that reads, writes, makes a process and \
             runs two programs",
            runtime.capabilities().isolation
        ))
        .emit()
        .unwrap();
}
