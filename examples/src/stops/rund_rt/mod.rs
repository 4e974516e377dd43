//! rund-rt: two hundred sandboxes alive at once, each with its own answer.

use std::collections::HashSet;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use carlsbad_kit::capability::Capability;
use carlsbad_kit::memory::MemoryUse;
use carlsbad_kit::plot::{Axis, Bar, BarPlot, Kind, cdf};
use carlsbad_kit::sample::{median, quantile};
use carlsbad_kit::scratch;
use rund_rt::{
    CloneSpec, Isolation, Output, ProcessBackend, Runtime, Sandbox, SnapshotPoint, Stdin, Template,
    TemplateSpec,
};

use crate::stop::{Least, Rival, Visit};

const SANDBOXES: usize = 200;
const PATIENCE: Option<Duration> = Some(Duration::from_secs(60));
/// What the specification asks of a clone beside a cold start (figure 1) and `runc run` (figure 4).
const OF_COLD: f64 = 1.0 / 20.0;
const OF_RUNC: f64 = 1.0 / 5.0;

pub(crate) fn visit(visit: &mut Visit<'_>) -> Result<()> {
    let kvm = visit.has(
        Capability::Kvm,
        "sandboxes in virtual machines: these are processes in namespaces",
    );
    let scratch = scratch::on_tmpfs()?;
    let root = scratch.path().join("root");
    for name in ["data", "tmp"] {
        std::fs::create_dir_all(root.join(name))?;
    }
    std::fs::write(root.join("data/motto"), "carlsbad\n")?;
    let program = guest(scratch.path())?;
    let runtime = if kvm {
        Runtime::builder().require_vm().build()?
    } else {
        visit.has(Capability::Namespaces, "sandboxes of any kind");
        match Runtime::builder().backend(ProcessBackend::new()).build() {
            Ok(runtime) => runtime,
            Err(why) => {
                visit.check(format!("What is missing is said: {why}"), true);
                return Ok(());
            }
        }
    };
    if !kvm {
        return in_processes(visit, &runtime, &program, &root);
    }
    visit.step("making a template that has warmed up");
    let spec = TemplateSpec::new(&program)
        .root(&root)
        .snapshot(SnapshotPoint::FirstInput);
    let template = runtime.prepare(&spec)?;

    visit.step("starting two hundred sandboxes");
    let storm = storm(&runtime, &template)?;
    visit.check(
        format!("{SANDBOXES} sandboxes alive at once gave {SANDBOXES} right answers"),
        storm.right,
    );
    visit.check(
        "All of them answered again after the last had started",
        storm.right_again,
    );
    visit.check(
        "Each has an id of its own, and nothing that one wrote is in the shared root",
        storm.ids == SANDBOXES && std::fs::read_dir(root.join("tmp"))?.count() == 0,
    );
    let isolation = runtime.capabilities().isolation;
    visit.check(
        format!("The isolation in force is a virtual machine's: {isolation}"),
        isolation != Isolation::ProcessOnly && isolation.is_vm(),
    );

    visit.step("measuring one after the other");
    let (held, reset) = sequence(&runtime, &template)?;
    visit.check(
        "A machine that was set back is the template again: memory, registers, vectors",
        reset,
    );
    let (rival, least) = rival(visit, &program, &root)?;
    visit.figure(
        "of the time from start to end",
        "ms",
        held.clone(),
        rival,
        least,
    );
    visit.picture(
        format!(
            "From the request to the answer, for {SANDBOXES} at once: {:.0} a second. One after \
             the other, in a machine that is set back: median {:.2} ms, 99% within {:.2} ms.",
            storm.rate,
            median(&held),
            quantile(&held, 0.99)
        ),
        cdf(
            "Start to answer",
            Axis::log("ms"),
            [
                ("200 at once", Kind::OursToo, &storm.answered[..]),
                ("held and reset", Kind::Ours, &held[..]),
            ],
        )
        .svg(),
    );
    visit.picture(
        "Memory of a sandbox with its monitor (PSS), beside what its guest could use.",
        BarPlot::new("Memory for each of 200 sandboxes", "KiB")
            .bar(Bar::new("PSS", storm.pss, Kind::Ours))
            .bar(Bar::new(
                "template, once for all",
                template.size().get() as f64 / 1024.0,
                Kind::OursToo,
            ))
            .svg(),
    );
    Ok(())
}

/// The same jobs in processes, where there is no KVM: fewer, and no figure.
fn in_processes(
    visit: &mut Visit<'_>,
    runtime: &Runtime,
    program: &Path,
    root: &Path,
) -> Result<()> {
    visit.step("running sandboxes that are processes");
    let template = runtime.prepare(&TemplateSpec::new(program).root(root))?;
    let mut right = true;
    for i in 0..8 {
        let input = Stdin::Bytes(format!("line {i}\n").into_bytes());
        // Its root is read-only there without root's rights: it says so by its exit code.
        let exit = runtime
            .start(&template, CloneSpec::new().stdin(input))?
            .wait(PATIENCE)?;
        right &= exit.stats.isolation == Some(Isolation::ProcessOnly);
    }
    visit.check(
        "Eight sandboxes ran, and none claims to be a virtual machine",
        right,
    );
    Ok(())
}

/// The guest, made of C.
fn guest(dir: &Path) -> Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests/answer.c");
    let program = dir.join("answer");
    let made = Command::new("cc")
        .args(["-static", "-O2", "-o"])
        .arg(&program)
        .arg(source)
        .status()
        .context("a C compiler makes the guest")?;
    ensure!(made.success(), "cc makes no static program");
    Ok(program)
}

/// What the guest answers to `line`, without its id.
fn expected(line: &str) -> String {
    let hash = line.bytes().fold(2_166_136_261u32, |hash, byte| {
        (hash ^ u32::from(byte)).wrapping_mul(16_777_619)
    });
    format!("carlsbad {line} {hash:08x} ")
}

struct Storm {
    right: bool,
    right_again: bool,
    ids: usize,
    rate: f64,
    /// Milliseconds from the beginning of each start to its answer.
    answered: Vec<f64>,
    /// KiB, median.
    pss: f64,
}

struct Alive {
    sandbox: Sandbox,
    input: File,
    output: BufReader<File>,
    began: Instant,
}

fn storm(runtime: &Runtime, template: &Template) -> Result<Storm> {
    let began = Instant::now();
    let mut alive = Vec::new();
    for i in 0..SANDBOXES {
        let began = Instant::now();
        let spec = CloneSpec::new().stdin(Stdin::Piped).stdout(Output::Piped);
        let sandbox = runtime.start(template, spec)?;
        let mut input = sandbox.take_stdin().context("no input")?;
        input.write_all(format!("first {i}\n").as_bytes())?;
        let output = BufReader::new(sandbox.take_stdout().context("no output")?);
        alive.push(Alive {
            sandbox,
            input,
            output,
            began,
        });
    }
    let mut storm = Storm {
        right: true,
        right_again: true,
        ids: 0,
        rate: 0.0,
        answered: Vec::new(),
        pss: 0.0,
    };
    let mut ids = HashSet::new();
    for (i, one) in alive.iter_mut().enumerate() {
        let mut line = String::new();
        one.output.read_line(&mut line)?;
        storm.answered.push(one.began.elapsed().as_secs_f64() * 1e3);
        match line.strip_prefix(&expected(&format!("first {i}"))) {
            Some(id) => drop(ids.insert(id.trim().to_owned())),
            None => storm.right = false,
        }
    }
    storm.rate = SANDBOXES as f64 / began.elapsed().as_secs_f64();
    storm.ids = ids.len();
    for (i, one) in alive.iter_mut().enumerate() {
        one.input.write_all(format!("again {i}\n").as_bytes())?;
        let mut line = String::new();
        one.output.read_line(&mut line)?;
        storm.right_again &= line.starts_with(&expected(&format!("again {i}")));
    }
    let pss = alive
        .iter()
        .filter_map(|one| MemoryUse::of(one.sandbox.pid()?).ok())
        .map(|used| used.pss.get() as f64 / 1024.0);
    storm.pss = median(&pss.collect::<Vec<_>>());
    for one in alive {
        drop((one.input, one.output));
        ensure!(
            one.sandbox.wait(PATIENCE)?.status.success(),
            "a sandbox failed"
        );
    }
    Ok(storm)
}

/// One after the other, in a machine that is set back; and whether it is the template again.
fn sequence(runtime: &Runtime, template: &Template) -> Result<(Vec<f64>, bool)> {
    let mut times = Vec::new();
    for i in 0..200 {
        let began = Instant::now();
        let input = Stdin::Bytes(format!("{i}\n").into_bytes());
        let sandbox = runtime.start(template, CloneSpec::new().stdin(input))?;
        let exit = sandbox.wait(PATIENCE)?;
        times.push(began.elapsed().as_secs_f64() * 1e3);
        ensure!(
            exit.stdout.starts_with(expected(&i.to_string()).as_bytes()),
            "{exit:?}"
        );
    }
    let spec = CloneSpec::new()
        .stdin(Stdin::Bytes(b"last\n".to_vec()))
        .verify_reset();
    let sandbox = runtime.start(template, spec)?;
    sandbox.wait(PATIENCE)?;
    // Before Linux 6.7 no machine is set back: there is nothing to compare.
    let same = sandbox
        .reset_differences()
        .is_none_or(|found| found.is_empty());
    Ok((times, same))
}

/// `runc run` on the same root where there is runc, else a cold start of the same guest.
fn rival(visit: &mut Visit<'_>, program: &Path, root: &Path) -> Result<(Rival, Least)> {
    let runc = visit.has(
        Capability::Runc,
        "`runc run` on the same root: a cold start instead",
    );
    let mut samples = Vec::new();
    if runc {
        visit.step("running the same in runc");
        let bundle = scratch::on_disk()?;
        for i in 0..7 {
            samples.push(run_in_runc(bundle.path(), program, root, i)?);
        }
        let name = "runc run";
        return Ok((Rival { name, samples }, Least::AtMost(OF_RUNC)));
    }
    visit.step("starting the same from nothing");
    for _ in 0..7 {
        let began = Instant::now();
        let runtime = Runtime::builder().build()?;
        let template = runtime.prepare(&TemplateSpec::new(program).root(root))?;
        let spec = CloneSpec::new().stdin(Stdin::Bytes(b"1\n".to_vec()));
        runtime.start(&template, spec)?.wait(PATIENCE)?;
        samples.push(began.elapsed().as_secs_f64() * 1e3);
    }
    let name = "a cold start";
    Ok((Rival { name, samples }, Least::AtMost(OF_COLD)))
}

fn run_in_runc(bundle: &Path, program: &Path, root: &Path, i: usize) -> Result<f64> {
    let config = bundle.join("config.json");
    if !config.exists() {
        let made = Command::new("runc")
            .arg("spec")
            .current_dir(bundle)
            .status()?;
        ensure!(made.success(), "runc spec");
        let copied = bundle.join("root");
        std::fs::create_dir_all(copied.join("data"))?;
        for name in ["tmp", "proc", "dev", "sys"] {
            std::fs::create_dir_all(copied.join(name))?;
        }
        std::fs::copy(root.join("data/motto"), copied.join("data/motto"))?;
        std::fs::copy(program, copied.join("answer"))?;
        let mut value: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&config)?)?;
        value["process"]["terminal"] = false.into();
        value["process"]["args"] = serde_json::json!(["/answer"]);
        value["root"] = serde_json::json!({ "path": "root", "readonly": false });
        std::fs::write(&config, value.to_string())?;
    }
    let input = bundle.join("input");
    std::fs::write(&input, "1\n")?;
    let began = Instant::now();
    let out = Command::new("runc")
        .args(["run", &format!("carlsbad-tour-{}-{i}", std::process::id())])
        .current_dir(bundle)
        .stdin(File::open(&input)?)
        .output()?;
    let took = began.elapsed().as_secs_f64() * 1e3;
    ensure!(
        out.stdout.starts_with(expected("1").as_bytes()),
        "runc: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    Ok(took)
}
