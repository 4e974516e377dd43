//! What the tests share: a runtime whose helper is the command-line tool, roots, guest programs.
#![allow(dead_code, unreachable_pub, reason = "each test file uses some of it")]
#![allow(clippy::unwrap_used, reason = "a test says what went wrong by failing")]

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use rund_rt::{CloneSpec, Exit, Runtime, Template, TemplateSpec};
use tempfile::TempDir;

/// Where Debian's `busybox-static` has its program.
pub const BUSYBOX: &str = "/usr/bin/busybox";
/// How long a sandbox may take on a machine that is busy.
pub const PATIENCE: Option<std::time::Duration> = Some(std::time::Duration::from_secs(60));

/// A runtime with `kvm-elf`.
pub fn runtime() -> Runtime {
    Runtime::builder()
        .helper(env!("CARGO_BIN_EXE_rund"))
        .require_vm()
        .build()
        .unwrap()
}

/// A template of busybox that sees `root`.
pub fn busybox(runtime: &Runtime, root: &Path) -> Template {
    let mut spec = TemplateSpec::new(BUSYBOX).env(["PATH=/bin"]).root(root);
    spec.inside = Some("/bin/busybox".into());
    runtime.prepare(&spec).unwrap()
}

/// A root with busybox and some files.
pub fn root() -> TempDir {
    let dir = tempfile::Builder::new()
        .prefix("rund-root-")
        .tempdir()
        .unwrap();
    let at = |path: &str| dir.path().join(path);
    for name in ["bin", "etc", "tmp", "data", "dev", "data/deep/er"] {
        fs::create_dir_all(at(name)).unwrap();
    }
    fs::copy(BUSYBOX, at("bin/busybox")).unwrap();
    let list = Command::new(BUSYBOX).arg("--list").output().unwrap();
    for name in String::from_utf8(list.stdout).unwrap().lines() {
        if name != "busybox" {
            symlink("busybox", at("bin").join(name)).unwrap();
        }
    }
    fs::write(at("etc/passwd"), "root:x:0:0:root:/:/bin/sh\n").unwrap();
    fs::write(at("etc/group"), "root:x:0:\n").unwrap();
    fs::write(at("data/words"), "pear\napple\nfig\napple\nbanana\n").unwrap();
    fs::write(at("data/numbers"), "10\n9\n2\n33\n1\n").unwrap();
    let long: String = (0..20_000).map(|i| format!("line {i}\n")).collect();
    fs::write(at("data/long"), long).unwrap();
    fs::write(at("data/deep/er/leaf"), "leaf\n").unwrap();
    fs::write(at("data/empty"), "").unwrap();
    symlink("words", at("data/link")).unwrap();
    symlink("/data/deep", at("data/deeplink")).unwrap();
    symlink("../../../../../../etc/passwd", at("data/escape")).unwrap();
    symlink("loop", at("data/loop")).unwrap();
    dir
}

/// Runs a clone to its end.
pub fn run(runtime: &Runtime, template: &Template, spec: CloneSpec) -> Exit {
    runtime
        .start(template, spec)
        .unwrap()
        .wait(PATIENCE)
        .unwrap()
}

/// Runs a shell script in a clone of busybox.
pub fn shell(runtime: &Runtime, template: &Template, script: &str) -> Exit {
    let args = ["busybox", "sh", "-c", script];
    run(runtime, template, CloneSpec::new().args(args))
}

/// A guest that was made elsewhere, where there is no compiler here.
fn made_before(name: &str) -> Option<PathBuf> {
    std::env::var_os("CARLSBAD_GUESTS").map(|dir| Path::new(&dir).join(name))
}

/// Whether this machine is emulated, so that it does a part of the work.
pub fn is_slow() -> bool {
    std::env::var_os("CARLSBAD_SLOW").is_some()
}

/// A static program made of a C file of `tests/guests`; none where there is no C compiler.
pub fn c_program(dir: &Path, name: &str) -> Option<PathBuf> {
    let program = dir.join(name);
    if let Some(made) = made_before(name) {
        fs::copy(made, &program).unwrap();
        return Some(program);
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/guests/{name}.c"));
    let made = Command::new("cc")
        .args(["-static", "-O2", "-o"])
        .arg(&program)
        .arg(source)
        .status();
    made.is_ok_and(|status| status.success()).then_some(program)
}

/// A static program made of a Rust file of `tests/guests`: with musl where that target is there,
/// else position-independent with glibc.
pub fn rust_program(dir: &Path, name: &str, musl: bool) -> Option<PathBuf> {
    let program = dir.join(name);
    if let Some(made) = made_before(name) {
        if musl {
            return None;
        }
        fs::copy(made, &program).unwrap();
        return Some(program);
    }
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/guests/{name}.rs"));
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition", "2024", "-O", "-o"]).arg(&program);
    if musl {
        rustc.args(["--target", "x86_64-unknown-linux-musl"]);
    } else {
        rustc.args(["-C", "target-feature=+crt-static"]);
    }
    let made = rustc.arg(source).output();
    made.is_ok_and(|made| made.status.success())
        .then_some(program)
}

/// What the bytes say, for messages.
pub fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
