//! The socket: one frontend after the other, and the orderly end.
//!
//! - One session at a time; who connects meanwhile waits. A session's end, however it comes,
//!   drains the queues; the next one begins with a device in its initial state.
//! - The socket file is ours: a stale one (nobody answers) is replaced, a living one is an error,
//!   and it is removed at the end if it is still the one we made.
//! - [`Server::stop`] returns when no queue touches guest memory or the device any more.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sapwood_blockdev::device::BlockDevice;
use sapwood_blockdev::engine::WatchFd;
use thiserror::Error;
use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};

use crate::backend::Backend;
use crate::request::layout::ID_BYTES;
use crate::worker::{Setup, Worker};

mod channel;
mod control;
mod socket;

use control::Control;
pub use socket::SocketFile;

/// Queues that a device can have: the message that carries a descriptor has 8 bits for the index.
pub const QUEUES_MAX: u16 = 256;

/// How long to leave a listener alone that reports errors (too many open files, as a rule).
const ACCEPT_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// How to serve a device.
#[derive(Clone, Debug)]
pub struct Options {
    /// The socket's path.
    pub socket: PathBuf,
    /// Virtqueues, 1 to [`QUEUES_MAX`]: each is a thread.
    pub queues: u16,
    /// What GET_ID answers; cut to 20 bytes.
    pub serial: String,
    /// How long a queue's thread polls at most before it sleeps. Zero: never.
    pub poll_max: Duration,
}

impl Options {
    /// One queue, no serial, the default polling.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), queues: 1, serial: String::new(), poll_max: Duration::from_micros(50) }
    }
}

/// Why a device cannot be served.
#[derive(Debug, Error)]
pub enum ServerError {
    /// Zero or too many queues.
    #[error("{0} queues: there can be 1 to {QUEUES_MAX}")]
    Queues(u16),
    /// Somebody answers at the socket.
    #[error("{}: another process serves this socket", .0.display())]
    InUse(PathBuf),
    /// There is a file, and it is not a socket.
    #[error("{}: exists and is not a socket", .0.display())]
    NotASocket(PathBuf),
    /// The socket could not be made.
    #[error("{}: {source}", path.display())]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A queue's thread or engine could not be made.
    #[error("queue {index}: {source}")]
    Queue {
        /// The queue.
        index: u16,
        /// What the system said.
        source: io::Error,
    },
    /// A thread or descriptor could not be made.
    #[error("cannot start serving: {0}")]
    System(#[from] io::Error),
}

/// A device being served by threads of its own. Dropping it stops it.
#[derive(Debug)]
pub struct Server {
    control: Arc<Control>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Server {
    /// Starts serving. `factory` makes the engine of a queue, in that queue's thread.
    ///
    /// # Errors
    /// Bad options, a socket in use, or what the system says.
    pub fn start<D>(
        device: Arc<D>,
        options: Options,
        factory: impl Fn() -> io::Result<D::Engine> + Send + Sync + 'static,
    ) -> Result<Self, ServerError>
    where
        D: BlockDevice<Engine: WatchFd>,
    {
        if !(1..=QUEUES_MAX).contains(&options.queues) {
            return Err(ServerError::Queues(options.queues));
        }
        let (file, listener) = SocketFile::bind(&options.socket)?;
        let workers = workers(&device, &options, Arc::new(factory))?;
        let control = Arc::new(Control::new()?);
        let serving = Arc::clone(&control);
        let thread = thread::Builder::new().name("vhost-user".into()).spawn(move || {
            while let Some(stream) = accept(&listener, &serving) {
                log::info!("a frontend has connected");
                match session(stream, &serving, &device, &workers) {
                    Ok(()) => log::info!("the frontend has gone"),
                    Err(error) => log::warn!("the session ends: {error}"),
                }
            }
            // In this order: nobody can connect, then the queues' threads end.
            drop((file, listener, workers));
        })?;
        Ok(Self { control, thread: Mutex::new(Some(thread)) })
    }

    /// Ends the session, drains all queues and ends their threads. From any thread, any number
    /// of times; returns when it is done.
    pub fn stop(&self) {
        self.control.stop();
        self.wait();
    }

    /// Returns when the server has stopped.
    pub fn wait(&self) {
        // Whoever comes second waits for the lock, and so for the thread too.
        let mut thread = lock(&self.thread);
        if thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the server's thread panicked");
        }
    }

    /// Whether a frontend is connected.
    pub fn is_connected(&self) -> bool {
        self.control.is_connected()
    }

    /// Tells the frontend that the configuration space has changed: the disk was resized. It is
    /// a notice without answer; a frontend that does not take such notices reads the new size
    /// when it looks.
    pub fn config_changed(&self) {
        self.control.config_changed();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop();
    }
}

fn workers<D: BlockDevice<Engine: WatchFd>>(
    device: &Arc<D>,
    options: &Options,
    factory: Arc<impl Fn() -> io::Result<D::Engine> + Send + Sync + 'static>,
) -> Result<Arc<[Worker]>, ServerError> {
    let mut id = [0; ID_BYTES];
    let len = options.serial.len().min(ID_BYTES);
    id[..len].copy_from_slice(&options.serial.as_bytes()[..len]);
    let spawn = |index| {
        let factory = Arc::clone(&factory);
        let setup =
            Setup { device: Arc::clone(device), index: usize::from(index), id, spin: options.poll_max };
        Worker::spawn(setup, move || factory()).map_err(|source| ServerError::Queue { index, source })
    };
    (0..options.queues).map(spawn).collect()
}

/// The next frontend; `None` when the server is to stop.
fn accept(listener: &UnixListener, control: &Control) -> Option<UnixStream> {
    loop {
        if !control.readable(listener) {
            return None;
        }
        match listener.accept() {
            Ok((stream, _)) => return Some(stream),
            Err(error) => {
                log::error!("accepting a frontend: {error}");
                let mut fds = [PollFd::new(control.wake(), PollFlags::IN)];
                let _ = poll(&mut fds, Some(&ACCEPT_PAUSE));
            }
        }
    }
}

/// Serves one frontend until it goes, or does what it may not, or the server is to stop.
fn session<D: BlockDevice>(
    stream: UnixStream,
    control: &Control,
    device: &Arc<D>,
    workers: &Arc<[Worker]>,
) -> Result<(), ProtocolError> {
    let backend = Arc::new(Mutex::new(Backend::new(Arc::clone(device), Arc::clone(workers))));
    control.begin(stream.try_clone().map_err(ProtocolError::SocketError)?);
    let mut handler = BackendReqHandler::from_stream(
        stream.try_clone().map_err(ProtocolError::SocketError)?,
        Arc::clone(&backend),
    );
    let mut result = Ok(());
    while result.is_ok() && control.readable(&stream) {
        if let Some(channel) = channel::peek(&stream)
            && lock(&backend).takes_notices()
        {
            // Before the message is acknowledged: from then on the frontend relies on it.
            control.set_channel(channel);
        }
        result = handler.handle_request();
        if let Err(ProtocolError::ReqHandlerError(why)) = &result {
            log::warn!("a message was refused: {why}");
            result = Ok(());
        }
    }
    control.end();
    lock(&backend).stop_all();
    match result {
        Err(ProtocolError::Disconnected) => Ok(()),
        // A stop shuts the socket down under a message.
        Err(_) if control.stopping() => Ok(()),
        other => other,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
