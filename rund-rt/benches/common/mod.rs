//! What the benches share.
#![allow(dead_code, unreachable_pub, reason = "each bench uses some of it")]
#![allow(
    clippy::unwrap_used,
    reason = "a bench says what went wrong by failing"
)]

use std::path::{Path, PathBuf};
use std::process::Command;

use carlsbad_kit::scratch::TempDir;
use rund_rt::{Runtime, SnapshotPoint, Template, TemplateSpec};

/// How long a sandbox may take.
pub const PATIENCE: Option<std::time::Duration> = Some(std::time::Duration::from_secs(60));

pub fn runtime() -> Runtime {
    Runtime::builder().require_vm().build().unwrap()
}

/// A static program made of a C file of `tests/guests`.
pub fn c_program(dir: &Path, name: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/guests/{name}.c"));
    let program = dir.join(name);
    let mut cc = Command::new("cc");
    cc.args(["-static", "-O2", "-o"]).arg(&program).arg(source);
    assert!(cc.status().unwrap().success());
    program
}

/// `serve`: reads its root, writes its upper layer, says its id, for each line of its input.
pub struct Serve {
    pub dir: TempDir,
    pub program: PathBuf,
}

impl Serve {
    pub fn new() -> Self {
        let dir = carlsbad_kit::scratch::on_tmpfs().unwrap();
        for name in ["root/data", "root/tmp"] {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        std::fs::write(dir.path().join("root/data/motto"), "motto\n").unwrap();
        let program = c_program(dir.path(), "serve");
        Self { dir, program }
    }

    pub fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    pub fn spec(&self) -> TemplateSpec {
        TemplateSpec::new(&self.program).root(self.root())
    }

    /// Saved when it waits for its input.
    pub fn template(&self, runtime: &Runtime) -> Template {
        runtime
            .prepare(&self.spec().snapshot(SnapshotPoint::FirstInput))
            .unwrap()
    }
}
