//! tetris-store's views in unmodified ONNX Runtime and torch: are the outputs those of the files,
//! and what memory do a base and its fine-tunes take in five processes?

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use carlsbad_kit::capability::{Capability, data_dir};
use carlsbad_kit::figure::{Baseline, Figure};
use carlsbad_kit::memory::{MemoryUse, shmem};
use carlsbad_kit::scratch;
use serde::Deserialize;

use crate::shell;
use crate::workspace::{Package, Workspace};

const TUNES: usize = 4;
const NEEDS: [Capability; 4] = [
    Capability::SharedMemory,
    Capability::Data,
    Capability::OnnxRuntime,
    Capability::Torch,
];

/// A runtime, and how its models lie on disk.
struct Runtime {
    /// What `peer.py` calls it.
    name: &'static str,
    /// Where `family.py` puts its models.
    folder: &'static str,
    /// What a model's file or folder has after its name.
    suffix: &'static str,
    /// What of a view it is given.
    entry: &'static str,
    /// The figures: added PSS, added memory.
    figures: [&'static str; 2],
}

const RUNTIMES: [Runtime; 2] = [
    Runtime {
        name: "onnxruntime",
        folder: "onnx",
        suffix: ".onnx",
        entry: "model.onnx",
        figures: ["tetris-store/2", "tetris-store/2c"],
    },
    Runtime {
        name: "torch",
        folder: "safetensors",
        suffix: "",
        entry: "",
        figures: ["tetris-store/2b", "tetris-store/2d"],
    },
];

pub(super) fn run(package: &Package, rounds: usize) -> Result<Vec<Figure>> {
    if let Some(missing) = NEEDS.into_iter().find(|need| !need.or_skip()) {
        let skip = |id: &&str| Figure::new(*id, "peers", "MiB").without(missing);
        return Ok(RUNTIMES
            .iter()
            .flat_map(|r| r.figures.iter().map(skip))
            .collect());
    }
    let workspace = Workspace::load()?;
    let python = Capability::Torch.python().context("no Python has torch")?;
    let bench = Bench {
        family: make_family(package, &workspace, &python)?,
        exporter: build_exporter(package, &workspace)?,
        peer: package.folder().join("peers").join("peer.py"),
        python,
    };
    let mut figures = Vec::new();
    for runtime in &RUNTIMES {
        figures.extend(bench.compare(runtime, rounds)?);
    }
    Ok(figures)
}

/// The models' names: a base and its fine-tunes.
fn names() -> Vec<String> {
    let tunes = (1..=TUNES).map(|number| format!("tune-{number}"));
    std::iter::once("base".to_owned()).chain(tunes).collect()
}

/// The family of models, made anew when the scripts that make it have changed.
fn make_family(package: &Package, workspace: &Workspace, python: &Path) -> Result<PathBuf> {
    let scripts = package.folder().join("peers");
    let mut recipe = format!("{TUNES} of them\n");
    for script in ["family.py", "encoder.py"] {
        recipe += &fs::read_to_string(scripts.join(script))?;
    }
    let family = workspace.target.join("peers").join(&package.name);
    let made = family.join("recipe");
    if fs::read_to_string(&made).is_ok_and(|text| text == recipe) {
        return Ok(family);
    }
    if family.exists() {
        fs::remove_dir_all(&family)?;
    }
    fs::create_dir_all(&family)?;
    shell::run(
        Command::new(python)
            .args(["-W", "ignore"])
            .arg(scripts.join("family.py"))
            .arg(data_dir().join("minilm-gt"))
            .arg(&family)
            .arg(TUNES.to_string()),
    )?;
    fs::write(made, recipe)?;
    Ok(family)
}

fn build_exporter(package: &Package, workspace: &Workspace) -> Result<PathBuf> {
    shell::run(
        shell::cargo()
            .args(["build", "--quiet", "--release", "--example", "export_views"])
            .args(["-p", &package.name]),
    )?;
    Ok(workspace.target.join("release/examples/export_views"))
}

struct Bench {
    family: PathBuf,
    exporter: PathBuf,
    python: PathBuf,
    peer: PathBuf,
}

/// What one set of processes said and took.
struct Measured {
    version: String,
    /// What identifies each model's outputs, by its name.
    outputs: BTreeMap<String, String>,
    /// Sum of PSS with the models, less without, in MiB.
    added_pss: f64,
    /// The same with all of the machine's shared memory instead of what is mapped of it.
    added_memory: f64,
}

impl Bench {
    fn compare(&self, runtime: &Runtime, rounds: usize) -> Result<[Figure; 2]> {
        let mut pss = (Vec::new(), Vec::new());
        let mut memory = (Vec::new(), Vec::new());
        let mut note = String::new();
        for round in 0..rounds {
            let mut unique = 0;
            let mut views = || {
                let scratch = scratch::on_tmpfs()?;
                let root = scratch.path().join("store");
                let measured = self.measure(runtime, &root.join("views"), runtime.entry, || {
                    unique = self.ingest(runtime, &root)?;
                    Ok(())
                });
                measured.context("views of the store")
            };
            let files = || {
                let scratch = scratch::on_tmpfs()?;
                let measured = self.measure(runtime, scratch.path(), runtime.suffix, || {
                    self.copy(runtime, scratch.path())
                });
                measured.context("a file per model")
            };
            let (ours, rival) = if round % 2 == 0 {
                let ours = views()?;
                (ours, files()?)
            } else {
                let rival = files()?;
                (views()?, rival)
            };
            ensure!(
                ours.outputs == rival.outputs,
                "{}: a view's outputs are not those of the model's own file:\n{:#?}\n{:#?}",
                runtime.name,
                ours.outputs,
                rival.outputs
            );
            // Or the comparison would prove nothing.
            let distinct: std::collections::BTreeSet<_> = ours.outputs.values().collect();
            ensure!(
                distinct.len() == TUNES + 1,
                "{}: two models have the same outputs",
                runtime.name
            );
            pss.0.push(ours.added_pss);
            pss.1.push(mib(unique));
            memory.0.push(ours.added_memory);
            memory.1.push(rival.added_memory);
            note = format!(
                "{} {}, {} processes, outputs bit-equal; a file per model adds {:.1} MiB of PSS",
                runtime.name,
                ours.version,
                TUNES + 1,
                rival.added_pss
            );
        }
        let figure = |id: &str, what: &str, rival: &str, (ours, theirs): (Vec<f64>, Vec<f64>)| {
            let what = format!("base + {TUNES} fine-tunes in {}: {what}", runtime.name);
            let mut figure = Figure::new(id, what, "MiB").samples(ours).note(&note);
            figure.baseline = Some(Baseline {
                name: rival.to_owned(),
                samples: theirs,
            });
            figure
        };
        let [added_pss, added_memory] = runtime.figures;
        Ok([
            figure(added_pss, "added PSS", "unique bytes", pss),
            figure(
                added_memory,
                "added memory",
                "a file per model on tmpfs",
                memory,
            ),
        ])
    }

    /// What five processes take that each run one of the models, which are at `folder`, each a
    /// name and `entry`, once `provide` has put them there.
    fn measure(
        &self,
        runtime: &Runtime,
        folder: &Path,
        entry: &str,
        provide: impl FnOnce() -> Result<()>,
    ) -> Result<Measured> {
        let warm_up = self.model(runtime, "warm-up");
        let mut peers = Vec::new();
        for name in names() {
            let model = match entry.strip_prefix('.') {
                Some(_) => folder.join(format!("{name}{entry}")),
                None => folder.join(&name).join(entry),
            };
            let mut command = Command::new(&self.python);
            command
                .arg(&self.peer)
                .arg(runtime.name)
                .arg(&warm_up)
                .arg(model);
            peers.push(Peer::start(name, &mut command)?);
        }
        for peer in &mut peers {
            peer.ask("start")?;
        }
        let mut version = String::new();
        for peer in &mut peers {
            version = peer.answer()?.version.context("no version")?;
        }
        let before = look(&peers)?;
        provide()?;
        for peer in &mut peers {
            peer.ask("load")?;
        }
        let mut outputs = BTreeMap::new();
        for peer in &mut peers {
            let sha256 = peer.answer()?.sha256.context("no outputs")?;
            outputs.insert(peer.name.clone(), sha256);
        }
        let after = look(&peers)?;
        for peer in &mut peers {
            peer.ask("stop")?;
        }
        Ok(Measured {
            version,
            outputs,
            added_pss: after.0 - before.0,
            added_memory: after.1 - before.1,
        })
    }

    /// A model as the family has it.
    fn model(&self, runtime: &Runtime, name: &str) -> PathBuf {
        self.family
            .join(runtime.folder)
            .join(format!("{name}{}", runtime.suffix))
    }

    /// Takes the models into a store and exports their views; how many bytes are unique.
    fn ingest(&self, runtime: &Runtime, root: &Path) -> Result<u64> {
        #[derive(Deserialize)]
        struct Exported {
            written: u64,
        }
        let mut exporter = Command::new(&self.exporter);
        exporter.arg(root);
        exporter.args(names().iter().map(|name| self.model(runtime, name)));
        let mut unique = 0;
        for line in shell::output(&mut exporter)?.lines() {
            let exported: Exported = serde_json::from_str(line)?;
            unique += exported.written;
        }
        Ok(unique)
    }

    /// What users do today: a file per model, on tmpfs.
    fn copy(&self, runtime: &Runtime, folder: &Path) -> Result<()> {
        let models = names();
        let mut copy = Command::new("cp");
        copy.arg("--recursive");
        copy.args(models.iter().map(|name| self.model(runtime, name)));
        copy.arg(folder);
        shell::output(&mut copy)?;
        Ok(())
    }
}

/// Sum of PSS, and the same with the machine's shared memory, mapped or not, in MiB. A tmpfs page
/// counts once in either.
fn look(peers: &[Peer]) -> Result<(f64, f64)> {
    let sum = MemoryUse::sum(peers.iter().map(|peer| peer.child.id()))?;
    let mapped = sum.pss_shmem.get();
    let all = sum.pss.get().saturating_sub(mapped) + shmem()?.get();
    Ok((mib(sum.pss.get()), mib(all)))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / (1 << 20) as f64
}

/// A process that runs one model; it ends with this value.
struct Peer {
    name: String,
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

#[derive(Debug, Deserialize)]
struct Answer {
    version: Option<String>,
    sha256: Option<String>,
}

impl Peer {
    fn start(name: String, command: &mut Command) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a peer")?;
        match (child.stdin.take(), child.stdout.take()) {
            (Some(input), Some(output)) => Ok(Self {
                name,
                child,
                input,
                output: BufReader::new(output),
            }),
            _ => bail!("a peer without pipes"),
        }
    }

    fn ask(&mut self, what: &str) -> Result<()> {
        writeln!(self.input, "{what}").with_context(|| format!("{}: it is gone", self.name))
    }

    fn answer(&mut self) -> Result<Answer> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line).with_context(|| format!("{}: it said `{line}`", self.name))
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
