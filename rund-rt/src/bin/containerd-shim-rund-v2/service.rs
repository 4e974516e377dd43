//! containerd's task service.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use containerd_shim as shim;
use oci_spec::runtime::{Process as OciProcess, Root};
use rund_rt::oci::Bundle;
use rund_rt::{ByteSize, CloneSpec, Status as ExitStatus};
use shim::api::Status;
use shim::event::Event;
use shim::protos::events::task as events;
use shim::protos::protobuf::well_known_types::any::Any;
use shim::protos::protobuf::{MessageDyn, MessageField};
use shim::publisher::RemotePublisher;
use shim::{
    Config, DeleteResponse, Error, ExitSignal, Flags, StartOpts, Task, TtrpcContext, TtrpcResult,
    api,
};

use crate::engine::{BACKEND_ANNOTATION, Engine, KVM_ELF, Started};
use crate::metrics;
use crate::mounts::{mount_at, unmount};
use crate::stdio::{self, Carrier, Names};
use crate::task::{Container, Process, Running};

/// What is in force for a container, in its bundle.
const IN_FORCE: &str = "rund.json";
/// The name under which all containers of a namespace find the same shim.
const GROUP: &str = "rund";
/// How long a shim without containers waits for another one.
const LINGER: Duration = Duration::from_secs(20);
/// What a process ignores unless it says otherwise, and the question whether it is there. The others
/// end it.
const ENDS_NOTHING: [i32; 5] = [
    0,
    libc::SIGCHLD,
    libc::SIGCONT,
    libc::SIGURG,
    libc::SIGWINCH,
];
/// Exit code of a process that could not be started.
const NOT_STARTED: i32 = 255;
/// How long a container's processes may take to die before its root is taken away.
const DEATH: Duration = Duration::from_secs(10);

/// The shim.
pub(crate) struct Service {
    namespace: String,
    bundle: String,
    exit: Arc<ExitSignal>,
}

impl shim::Shim for Service {
    type T = Tasks;

    fn new(_runtime: &str, flags: &Flags, _config: &mut Config) -> Self {
        Self {
            namespace: flags.namespace.clone(),
            bundle: flags.bundle.clone(),
            exit: Arc::new(ExitSignal::default()),
        }
    }

    fn start_shim(&mut self, opts: StartOpts) -> Result<String, Error> {
        let (_pid, address) = shim::spawn(opts, GROUP, Vec::new())?;
        Ok(address)
    }

    fn delete_shim(&mut self) -> Result<DeleteResponse, Error> {
        // What a killed shim has left of this container; its sandboxes died with it.
        unmount(&Path::new(&self.bundle).join("rootfs"));
        let mut response = DeleteResponse::new();
        response.set_exit_status(128 + libc::SIGKILL.unsigned_abs());
        response.set_exited_at(shim::util::timestamp()?);
        Ok(response)
    }

    fn wait(&mut self) {
        self.exit.wait();
        // Its own name for itself lies in the first container's bundle, which is gone by now.
        if let Ok(local) = nix::sys::socket::getsockname::<nix::sys::socket::UnixAddr>(SOCKET)
            && let Some(path) = local.path()
        {
            let _gone = std::fs::remove_file(path);
        }
    }

    fn create_task_service(&self, publisher: RemotePublisher) -> Tasks {
        Tasks {
            shared: Arc::new(Shared {
                namespace: self.namespace.clone(),
                exit: Arc::clone(&self.exit),
                publisher: Mutex::new(publisher),
                engine: Mutex::new(None),
                containers: Mutex::default(),
            }),
        }
    }
}

/// The socket that the shim library hands from the process that starts the shim to the shim.
const SOCKET: i32 = 3;

/// The task service: containers by their id.
#[derive(Clone)]
pub(crate) struct Tasks {
    shared: Arc<Shared>,
}

struct Shared {
    namespace: String,
    exit: Arc<ExitSignal>,
    publisher: Mutex<RemotePublisher>,
    /// Made with the first container, so that what is missing is that container's error.
    engine: Mutex<Option<Arc<Engine>>>,
    containers: Mutex<HashMap<String, Arc<Container>>>,
}

impl Shared {
    fn containers(&self) -> MutexGuard<'_, HashMap<String, Arc<Container>>> {
        let containers = self.containers.lock();
        containers.unwrap_or_else(PoisonError::into_inner)
    }

    fn engine(&self) -> TtrpcResult<Arc<Engine>> {
        let mut engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(engine) = &*engine {
            return Ok(Arc::clone(engine));
        }
        let made = Arc::new(Engine::new().map_err(failed)?);
        *engine = Some(Arc::clone(&made));
        Ok(made)
    }

    fn container(&self, id: &str) -> TtrpcResult<Arc<Container>> {
        let found = self.containers().get(id).cloned();
        found.ok_or_else(|| Error::NotFoundError(format!("no container `{id}`")).into())
    }

    fn process(&self, id: &str, exec_id: &str) -> TtrpcResult<(Arc<Container>, Arc<Process>)> {
        let container = self.container(id)?;
        let found = container.process(exec_id);
        let process = found.ok_or_else(|| {
            Error::NotFoundError(format!("no process `{exec_id}` in container `{id}`"))
        })?;
        Ok((container, process))
    }

    fn publish<E: Event + MessageDyn>(&self, event: E) {
        let topic = event.topic();
        let publisher = self.publisher.lock();
        let publisher = publisher.unwrap_or_else(PoisonError::into_inner);
        let context = shim::Context::default();
        let done = publisher.publish(context, &topic, &self.namespace, Box::new(event));
        if let Err(why) = done {
            tracing::warn!(%why, topic, "an event was not published");
        }
    }
}

/// For `map_err`.
fn failed(why: impl Into<anyhow::Error>) -> shim::protos::ttrpc::Error {
    Error::Other(format!("{:#}", why.into())).into()
}

/// Whether a container takes another process, as with runc: not while it is paused, nor after its
/// end.
fn enterable(container: &Container) -> TtrpcResult<()> {
    let first = container.process("");
    let why = match first.map(|first| first.status()) {
        Some(Status::PAUSED) => "is paused: resume it first",
        Some(Status::STOPPED) => "has ended",
        _ => return Ok(()),
    };
    let why = format!("container `{}` {why}", container.id);
    Err(Error::FailedPreconditionError(why).into())
}

impl Tasks {
    /// Mounts what containerd prepared, and reads the bundle.
    fn prepare(&self, request: &api::CreateTaskRequest) -> anyhow::Result<Container> {
        let rootfs = Path::new(&request.bundle).join("rootfs");
        for mount in &request.rootfs {
            mount_at(&rootfs, mount)?;
        }
        let bundle = Bundle::open(&request.bundle)?;
        let engine = self
            .shared
            .engine()
            .map_err(|why| anyhow::anyhow!("{why}"))?;
        let backend = engine.backend(bundle.annotation(BACKEND_ANNOTATION))?;
        let mut clone = bundle.clone_spec()?.id(&request.id);
        let host_name = bundle.spec().hostname().as_deref();
        if let Some(other) = host_name.filter(|name| !name.is_empty() && *name != request.id) {
            anyhow::bail!("it asks for the host name `{other}`: a container's is its id");
        }
        let read_only = bundle.spec().root().as_ref().and_then(Root::readonly);
        let read_only = read_only.unwrap_or(false);
        if read_only {
            clone.limits.upper = ByteSize::ZERO;
        }
        let root = match (backend, read_only) {
            (KVM_ELF, _) | (_, true) => None,
            (_, false) => Some(engine.split(bundle.root(), clone.limits.upper)?),
        };
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
        };
        let first = Process::new("", names, bundle.template()?, clone);
        Ok(Container {
            id: request.id.clone(),
            backend,
            root,
            processes: Mutex::new(HashMap::from([(String::new(), Arc::new(first))])),
            bundle,
        })
    }

    fn begin(&self, container: &Arc<Container>, process: &Arc<Process>) -> anyhow::Result<u32> {
        let taken = process.lock().clone.take();
        let Some(mut clone) = taken else {
            anyhow::bail!("it was started already");
        };
        clone.stdin = process.names.input();
        let (stdout, out) = stdio::output(&process.names.stdout)?;
        let (stderr, err) = stdio::output(&process.names.stderr)?;
        (clone.stdout, clone.stderr) = (stdout, stderr);
        let engine = self
            .shared
            .engine()
            .map_err(|why| anyhow::anyhow!("{why}"))?;
        let Started { instance, in_force } = engine.start(
            container.backend,
            &process.template,
            clone,
            container.root.as_ref(),
        )?;
        let instance: Arc<dyn rund_rt::Instance> = Arc::from(instance);
        let carrier = match instance.take_stdin() {
            Some(to) => Some(Carrier::start(&process.names.stdin, to)?),
            None => None,
        };
        if process.exec_id.is_empty() {
            let text = serde_json::to_string_pretty(&in_force)?;
            std::fs::write(container.bundle.path().join(IN_FORCE), text)?;
        }
        let pid = instance.pid().unwrap_or_default();
        let waits = Arc::clone(&instance);
        let running = Running {
            instance,
            carrier,
            _readers: [out, err],
        };
        process.began(pid, running);
        let (shared, process) = (Arc::clone(&self.shared), Arc::clone(process));
        let container = Arc::clone(container);
        let id = container.id.clone();
        // Ends with the sandbox, which ends with the shim at the latest.
        thread::Builder::new()
            .name("rund-wait".to_owned())
            .spawn(move || {
                let ended = waits.wait(None);
                drop(waits);
                // As in a PID namespace, whose first process takes all others with it.
                if process.exec_id.is_empty()
                    && let Err(why) = container.end_others(DEATH)
                {
                    tracing::warn!(%why, id, "a process of an ended container runs on");
                }
                drop(container);
                let (code, killed) = match ended {
                    Ok(exit) => {
                        let killed = exit.status == ExitStatus::Signal(libc::SIGKILL);
                        (exit.status.shell_code(), killed)
                    }
                    Err(why) => {
                        tracing::warn!(%why, id, "a sandbox is lost");
                        (255, false)
                    }
                };
                let at = shim::util::timestamp().unwrap_or_default();
                let end = process.ended(code, killed, at);
                shared.publish(events::TaskExit {
                    container_id: id.clone(),
                    id: if process.exec_id.is_empty() {
                        id
                    } else {
                        process.exec_id.clone()
                    },
                    pid,
                    exit_status: end.code,
                    exited_at: MessageField::some(end.at),
                    ..Default::default()
                });
            })?;
        Ok(pid)
    }

    /// Ends a process that has not begun, or that `failed` to; false where it has.
    fn give_up(&self, container: &Container, process: &Process, code: i32, failed: bool) -> bool {
        let at = shim::util::timestamp().unwrap_or_default();
        let Some(end) = process.give_up(code, failed, at) else {
            return false;
        };
        let id = if process.exec_id.is_empty() {
            container.id.clone()
        } else {
            process.exec_id.clone()
        };
        self.shared.publish(events::TaskExit {
            container_id: container.id.clone(),
            id,
            exit_status: end.code,
            exited_at: MessageField::some(end.at),
            ..Default::default()
        });
        true
    }

    /// Removes a container that has ended, with what was mounted for it.
    fn remove(&self, container: &Arc<Container>) {
        self.shared.containers().remove(&container.id);
        unmount(&container.bundle.path().join("rootfs"));
    }
}

impl Task for Tasks {
    fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> TtrpcResult<api::CreateTaskResponse> {
        if self.shared.containers().contains_key(&request.id) {
            let why = format!("container `{}` is there already", request.id);
            return Err(Error::FailedPreconditionError(why).into());
        }
        let container = match self.prepare(&request) {
            Ok(container) => container,
            Err(why) => {
                unmount(&Path::new(&request.bundle).join("rootfs"));
                return Err(failed(why));
            }
        };
        let pid = std::process::id();
        self.shared
            .containers()
            .insert(request.id.clone(), Arc::new(container));
        self.shared.publish(events::TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle.clone(),
            rootfs: request.rootfs.clone(),
            pid,
            ..Default::default()
        });
        Ok(api::CreateTaskResponse {
            pid,
            ..Default::default()
        })
    }

    fn start(
        &self,
        _: &TtrpcContext,
        request: api::StartRequest,
    ) -> TtrpcResult<api::StartResponse> {
        let (container, process) = self.shared.process(&request.id, &request.exec_id)?;
        if !request.exec_id.is_empty() {
            enterable(&container)?;
        }
        let pid = self.begin(&container, &process).map_err(|why| {
            // Else it would be a container that is yet to start, which nobody can delete.
            self.give_up(&container, &process, NOT_STARTED, true);
            failed(why)
        })?;
        if request.exec_id.is_empty() {
            self.shared.publish(events::TaskStart {
                container_id: request.id,
                pid,
                ..Default::default()
            });
        } else {
            self.shared.publish(events::TaskExecStarted {
                container_id: request.id,
                exec_id: request.exec_id,
                pid,
                ..Default::default()
            });
        }
        Ok(api::StartResponse {
            pid,
            ..Default::default()
        })
    }

    fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> TtrpcResult<api::Empty> {
        let container = self.shared.container(&request.id)?;
        if container.process(&request.exec_id).is_some() {
            let why = format!("process `{}` is there already", request.exec_id);
            return Err(Error::FailedPreconditionError(why).into());
        }
        enterable(&container)?;
        if request.terminal {
            return Err(Error::Unimplemented("a terminal".to_owned()).into());
        }
        let spec: OciProcess = serde_json::from_slice(&request.spec.value).map_err(failed)?;
        let template = container.bundle.template_of(&spec).map_err(failed)?;
        let clone: CloneSpec = container.bundle.clone_of(&spec).map_err(failed)?;
        let names = Names {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
        };
        let clone = clone.id(format!("{}.{}", request.id, request.exec_id));
        let process = Process::new(&request.exec_id, names, template, clone);
        container
            .processes()
            .insert(request.exec_id.clone(), Arc::new(process));
        self.shared.publish(events::TaskExecAdded {
            container_id: request.id,
            exec_id: request.exec_id,
            ..Default::default()
        });
        Ok(api::Empty::default())
    }

    fn state(
        &self,
        _: &TtrpcContext,
        request: api::StateRequest,
    ) -> TtrpcResult<api::StateResponse> {
        let (container, process) = self.shared.process(&request.id, &request.exec_id)?;
        let mut response = api::StateResponse {
            id: container.id.clone(),
            bundle: container.bundle.path().to_string_lossy().into_owned(),
            stdin: process.names.stdin.clone(),
            stdout: process.names.stdout.clone(),
            stderr: process.names.stderr.clone(),
            exec_id: request.exec_id,
            status: process.status().into(),
            ..Default::default()
        };
        let state = process.lock();
        response.pid = state.pid;
        if let Some(end) = &state.end {
            response.exit_status = end.code;
            response.exited_at = MessageField::some(end.at.clone());
        }
        Ok(response)
    }

    fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> TtrpcResult<api::WaitResponse> {
        let (_, process) = self.shared.process(&request.id, &request.exec_id)?;
        let end = process.wait();
        Ok(api::WaitResponse {
            exit_status: end.code,
            exited_at: MessageField::some(end.at),
            ..Default::default()
        })
    }

    fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> TtrpcResult<api::Empty> {
        let (container, process) = self.shared.process(&request.id, &request.exec_id)?;
        let targets = if request.all {
            container.all()
        } else {
            vec![process]
        };
        let known = |signal: &i32| (0..=libc::SIGRTMAX()).contains(signal);
        let Some(signal) = i32::try_from(request.signal).ok().filter(known) else {
            let why = format!("no signal has the number {} (EINVAL)", request.signal);
            return Err(Error::InvalidArgument(why).into());
        };
        for target in targets {
            if ENDS_NOTHING.contains(&signal) && target.is_alive() {
                continue;
            }
            if self.give_up(&container, &target, 128 + signal, false) {
                continue;
            }
            let Some(handle) = target.ask_to_end(signal) else {
                if request.all {
                    continue;
                }
                let why = "the process does not run".to_owned();
                return Err(Error::NotFoundError(why).into());
            };
            // A stopped one would not die.
            let _running = target.pause(false);
            handle.kill().map_err(failed)?;
        }
        Ok(api::Empty::default())
    }

    fn delete(&self, _: &TtrpcContext, request: api::DeleteRequest) -> TtrpcResult<DeleteResponse> {
        let (container, process) = self.shared.process(&request.id, &request.exec_id)?;
        if process.is_alive() {
            let why = "it runs: kill it first".to_owned();
            return Err(Error::FailedPreconditionError(why).into());
        }
        let (pid, end) = {
            let state = process.lock();
            (state.pid, state.end.clone())
        };
        if request.exec_id.is_empty() {
            container.end_others(DEATH).map_err(failed)?;
            self.remove(&container);
        } else {
            container.processes().remove(&request.exec_id);
        }
        let mut response = DeleteResponse::new();
        response.pid = pid;
        if let Some(end) = end {
            response.exit_status = end.code;
            response.exited_at = MessageField::some(end.at);
        }
        if request.exec_id.is_empty() {
            self.shared.publish(events::TaskDelete {
                container_id: request.id,
                pid,
                exit_status: response.exit_status,
                exited_at: response.exited_at.clone(),
                ..Default::default()
            });
        }
        Ok(response)
    }

    fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> TtrpcResult<api::PidsResponse> {
        let container = self.shared.container(&request.id)?;
        let mut response = api::PidsResponse::new();
        for process in container.all() {
            if process.is_alive() {
                response
                    .processes
                    .push(shim::protos::types::task::ProcessInfo {
                        pid: process.lock().pid,
                        ..Default::default()
                    });
            }
        }
        Ok(response)
    }

    fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> TtrpcResult<api::Empty> {
        let container = self.shared.container(&request.id)?;
        for process in container.all() {
            process.pause(true).map_err(failed)?;
        }
        self.shared.publish(events::TaskPaused {
            container_id: request.id,
            ..Default::default()
        });
        Ok(api::Empty::default())
    }

    fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> TtrpcResult<api::Empty> {
        let container = self.shared.container(&request.id)?;
        for process in container.all() {
            process.pause(false).map_err(failed)?;
        }
        self.shared.publish(events::TaskResumed {
            container_id: request.id,
            ..Default::default()
        });
        Ok(api::Empty::default())
    }

    fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> TtrpcResult<api::Empty> {
        let (_, process) = self.shared.process(&request.id, &request.exec_id)?;
        if request.stdin {
            process.close_input();
        }
        Ok(api::Empty::default())
    }

    fn stats(
        &self,
        _: &TtrpcContext,
        request: api::StatsRequest,
    ) -> TtrpcResult<api::StatsResponse> {
        let (_, process) = self.shared.process(&request.id, "")?;
        let pid = process.lock().pid;
        let metrics = metrics::of(pid).map_err(failed)?;
        let any: Any = shim::util::convert_to_any(Box::new(metrics))?;
        Ok(api::StatsResponse {
            stats: MessageField::some(any),
            ..Default::default()
        })
    }

    fn connect(
        &self,
        _: &TtrpcContext,
        request: api::ConnectRequest,
    ) -> TtrpcResult<api::ConnectResponse> {
        let task_pid = match self.shared.process(&request.id, "") {
            Ok((_, process)) => process.lock().pid,
            Err(_) => 0,
        };
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..Default::default()
        })
    }

    fn shutdown(&self, _: &TtrpcContext, request: api::ShutdownRequest) -> TtrpcResult<api::Empty> {
        let shared = Arc::clone(&self.shared);
        if !shared.containers().is_empty() {
            return Ok(api::Empty::default());
        }
        if request.now {
            shared.exit.signal();
            return Ok(api::Empty::default());
        }
        // Another container is likely to come: templates and groups are kept for it. This thread
        // ends with the shim at the latest.
        thread::spawn(move || {
            thread::sleep(LINGER);
            if shared.containers().is_empty() {
                *shared.engine.lock().unwrap_or_else(PoisonError::into_inner) = None;
                shared.exit.signal();
            }
        });
        Ok(api::Empty::default())
    }
}
