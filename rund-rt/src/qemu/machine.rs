//! One QEMU process: its serial line on its standard input and output, its monitor (QMP) on a
//! socket that it inherits.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use carlsbad_types::ByteSize;
use rustix::fs::{Mode, OFlags};
use serde_json::{Value, json};

use super::guest::SPLIT;
use crate::error::{Error, Result};

/// The kernel's arguments: quiet, and a reset where it would wait. The line is emulated at its
/// speed: a quarter of a millisecond passes until the last few bytes are taken for the last.
const KERNEL: &str = "console=ttyS0,115200 quiet reboot=t panic=-1 random.trust_cpu=on";

/// For `map_err`.
pub(super) fn failed<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |why| Error::Qemu {
        what,
        why: why.to_string(),
    }
}

/// What every machine of a template has in common.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) program: PathBuf,
    /// `tcg` or `kvm`.
    pub(super) accelerator: &'static str,
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) memory: ByteSize,
    /// An erofs image, which all machines of this shape read: in one page cache, the host's.
    pub(super) root: Option<Arc<File>>,
}

/// How a machine begins.
#[derive(Debug, Clone, Copy)]
pub(super) enum Start<'a> {
    /// It boots, and writes to the memory file.
    Boot,
    /// It goes on from a state that another machine of this shape wrote, with pages of its own over
    /// the memory file. One that is held stands still until it is [resumed](Machine::resume).
    From { state: &'a OwnedFd, held: bool },
}

impl Shape {
    /// What all machines of this shape are started with. Those that go on from a state have their
    /// kernel already, and need not read it again.
    fn arguments(&self, memory: &OwnedFd, start: Start<'_>, command: &mut Command) {
        let (share, sandbox) = match start {
            Start::Boot => ("on", "on,obsolete=deny,elevateprivileges=deny"),
            // Nor does it start a program, as the first does to save its state.
            Start::From { .. } => ("off", "on,obsolete=deny,elevateprivileges=deny,spawn=deny"),
        };
        let backend = format!(
            "memory-backend-file,id=m,size={},mem-path={},share={share}",
            self.memory.get(),
            path_of(memory),
        );
        command
            .args(["-M", "microvm,acpi=off,memory-backend=m"])
            .args(["-accel", self.accelerator, "-cpu", "max"])
            .arg("-m")
            .arg(format!("{}B", self.memory.get()))
            .arg("-object")
            .arg(backend)
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-serial", "stdio", "-sandbox", sandbox]);
        if let Some(root) = &self.root {
            command
                .arg("-blockdev")
                .arg(format!(
                    "driver=raw,node-name=r,read-only=on,file.driver=file,file.filename={},\
                     file.read-only=on,file.locking=off",
                    path_of(&**root)
                ))
                .args(["-device", "virtio-blk-device,drive=r"]);
        }
        match start {
            Start::Boot => command
                .arg("-kernel")
                .arg(&self.kernel)
                .arg("-initrd")
                .arg(&self.initramfs)
                .arg("-append")
                .arg(match self.root {
                    Some(_) => format!("{KERNEL} {SPLIT}"),
                    None => KERNEL.to_owned(),
                }),
            Start::From { .. } => command.args(["-incoming", "defer"]),
        };
    }
}

/// A running QEMU. It is killed when it is dropped.
#[derive(Debug)]
pub(super) struct Machine {
    child: Child,
    monitor: Monitor,
    pub(super) input: Option<ChildStdin>,
    pub(super) output: Option<ChildStdout>,
}

impl Machine {
    /// Starts a machine whose memory is the file behind `memory`. It runs when this returns.
    ///
    /// The thread that calls this has to live as long as the machine: QEMU is killed with it.
    pub(super) fn start(
        shape: &Shape,
        memory: &OwnedFd,
        start: Start<'_>,
        deadline: Instant,
    ) -> Result<Self> {
        let (ours, theirs) = UnixStream::pair().map_err(failed("make a monitor's socket"))?;
        let mut command = Command::new(&shape.program);
        shape.arguments(memory, start, &mut command);
        command
            .arg("-chardev")
            .arg(format!("socket,id=q,fd={}", theirs.as_raw_fd()))
            .args(["-mon", "chardev=q,mode=control"]);
        let state = match start {
            Start::Boot => None,
            // One file for each, since each reads from where it is in it.
            Start::From { state, .. } => {
                let flags = OFlags::RDONLY | OFlags::CLOEXEC;
                let state = rustix::fs::open(path_of(state), flags, Mode::empty());
                Some(state.map_err(failed("open its state"))?)
            }
        };
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        let inherited = [
            Some(theirs.as_raw_fd()),
            state.as_ref().map(OwnedFd::as_raw_fd),
        ];
        // SAFETY: between fork and exec it makes a few system calls, which are async-signal-safe.
        unsafe { command.pre_exec(move || prepare(&inherited)) };
        let held = matches!(start, Start::From { held: true, .. });
        if held {
            command.arg("-S");
        }
        let mut child = command.spawn().map_err(failed("start"))?;
        drop(theirs);
        let monitor = match Monitor::begin(ours, state.as_ref(), held, deadline) {
            Ok(monitor) => monitor,
            Err(why) => {
                let _gone = child.kill();
                let _gone = child.wait();
                return Err(why);
            }
        };
        Ok(Self {
            input: child.stdin.take(),
            output: child.stdout.take(),
            child,
            monitor,
        })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Lets one go that was held.
    pub(super) fn resume(&mut self) -> Result<()> {
        self.monitor.run("cont", &json!({})).map(|_| ())
    }

    /// A second way to its monitor, for another thread.
    pub(super) fn monitor(&self) -> Result<Monitor> {
        self.monitor.again()
    }

    /// Writes all but its memory to the file behind `state`, and ends it.
    pub(super) fn save(&mut self, state: &OwnedFd, deadline: Instant) -> Result<()> {
        // Not stopped before: what is saved is a machine that runs, and so will be its clones. The
        // path has digits and slashes: the shell that QEMU calls has nothing to take apart.
        let uri = format!("exec:cat > {}", path_of(state));
        self.monitor.run("migrate", &json!({ "uri": uri }))?;
        self.migrated(deadline)?;
        self.end().map(|_| ())
    }

    fn migrated(&mut self, deadline: Instant) -> Result<()> {
        loop {
            let now = self.monitor.run("query-migrate", &json!({}))?;
            match now["status"].as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => {
                    return Err(failed("move its state")(&now["error-desc"]));
                }
                _ if Instant::now() > deadline => {
                    return Err(failed("move its state")("it takes too long"));
                }
                _ => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Ends it: nothing in it is needed any more.
    pub(super) fn end(&mut self) -> Result<Option<i32>> {
        self.child.kill().map_err(failed("end it"))?;
        self.wait()
    }

    /// Waits for its end; whether it was killed.
    pub(super) fn wait(&mut self) -> Result<Option<i32>> {
        use std::os::unix::process::ExitStatusExt;

        let status = self.child.wait().map_err(failed("wait for it"))?;
        Ok(status.signal())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

/// Has the kernel kill this process with the thread that started it, and leave it some files.
fn prepare(inherited: &[Option<RawFd>]) -> io::Result<()> {
    // SAFETY: prctl takes numbers, and writes no memory.
    let mut done = unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0) };
    for file in inherited.iter().flatten() {
        // SAFETY: fcntl with F_SETFD takes numbers, and writes no memory.
        done |= unsafe { libc::fcntl(*file, libc::F_SETFD, 0) };
    }
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A file of ours, as another process of ours opens it.
fn path_of(file: &impl AsRawFd) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd())
}

/// The QEMU machine protocol: one line of JSON each way.
#[derive(Debug)]
pub(super) struct Monitor {
    lines: BufReader<UnixStream>,
}

/// How long QEMU may take to answer.
const ANSWER: Duration = Duration::from_secs(30);

impl Monitor {
    /// Waits until the machine behind this socket runs, or could if it is held; before that it reads
    /// the state that it has inherited.
    fn begin(
        mut stream: UnixStream,
        state: Option<&OwnedFd>,
        held: bool,
        deadline: Instant,
    ) -> Result<Self> {
        // Memory is in a file that both sides map: it is not sent.
        let ignore = json!([{"capability": "x-ignore-shared", "state": true}]);
        let mut asked = vec![
            json!({"execute": "qmp_capabilities"}),
            json!({"execute": "migrate-set-capabilities", "arguments": {"capabilities": ignore}}),
        ];
        if let Some(state) = state {
            let uri = format!("fd:{}", state.as_raw_fd());
            asked.push(json!({"execute": "migrate-incoming", "arguments": {"uri": uri}}));
        }
        asked.push(json!({"execute": "query-status"}));
        // All of it before there is anybody to answer: one turn, not five.
        let asked: String = asked.iter().map(Value::to_string).collect();
        stream
            .write_all(asked.as_bytes())
            .map_err(failed("speak to it"))?;
        let patience = deadline.saturating_duration_since(Instant::now());
        stream
            .set_read_timeout(Some(patience.clamp(Duration::from_millis(1), ANSWER)))
            .map_err(failed("reach its monitor"))?;
        let mut monitor = Self {
            lines: BufReader::new(stream),
        };
        loop {
            let said = monitor.hear()?;
            let now = &said["return"];
            if now["running"] == true || said["event"] == "RESUME" {
                break;
            }
            if held && now["status"] == "paused" {
                break;
            }
            if held && now.get("status").is_some() {
                // No event tells that it could run now. Nobody waits for it yet.
                thread::sleep(Duration::from_millis(1));
                let asked = json!({"execute": "query-status"}).to_string();
                let written = monitor.lines.get_mut().write_all(asked.as_bytes());
                written.map_err(failed("speak to it"))?;
                if Instant::now() > deadline {
                    return Err(failed("move its state")("it takes too long"));
                }
            }
            if let Some(error) = said.get("error") {
                return Err(failed("start")(&error["desc"]));
            }
        }
        let stream = monitor.lines.get_ref();
        stream
            .set_read_timeout(Some(ANSWER))
            .map_err(failed("reach its monitor"))?;
        Ok(monitor)
    }

    fn again(&self) -> Result<Self> {
        let stream = self.lines.get_ref().try_clone();
        Ok(Self {
            lines: BufReader::new(stream.map_err(failed("reach its monitor"))?),
        })
    }

    fn hear(&mut self) -> Result<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => Err(failed("hear from it")("it is gone")),
            Ok(_) => serde_json::from_str(&line).map_err(failed("understand it")),
            Err(why) => Err(failed("hear from it")(why)),
        }
    }

    /// Runs a command and gives its answer.
    pub(super) fn run(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        let written = self.lines.get_mut().write_all(line.as_bytes());
        written.map_err(failed("speak to it"))?;
        loop {
            let mut answer = self.hear()?;
            if let Some(error) = answer.get("error") {
                return Err(failed("run a command")(&error["desc"]));
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            // An event, of which nobody here asks.
        }
    }
}
