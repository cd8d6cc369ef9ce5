//! A socket: one thread, and bounds that no peer can pass.
//!
//! A connection is for one request. It has a time to come, a largest head and body, and a time to be
//! over; only so many are served at once, and who comes then waits in the kernel's queue.

use std::net::TcpListener as BoundTcp;
use std::os::unix::net::UnixListener as BoundUnix;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Context;
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use sapwood_vhost::SocketFile;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::{Semaphore, oneshot};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

/// Connections served at once.
const CONNECTIONS_MAX: usize = 32;
/// Longest head of a request in bytes.
const HEAD_BYTES_MAX: usize = 16 << 10;
/// Time for the head of a request.
const HEAD_TIME_MAX: Duration = Duration::from_secs(2);
/// How long to leave the socket alone when it reports errors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What is served.
#[derive(Clone)]
struct Service {
    router: Router,
    connection_time_max: Duration,
}

/// What is listened at. The file of a unix socket goes with it.
enum Bound {
    Unix(BoundUnix, SocketFile),
    Tcp(BoundTcp),
}

/// A listening socket and its thread. Dropping it stops both.
pub struct Listener {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Listener {
    /// Listens at `path` and serves `router`. A connection is closed after `connection_time_max`, whatever it is
    /// doing.
    pub fn start(path: &Path, router: Router, connection_time_max: Duration) -> anyhow::Result<Self> {
        let (file, bound) = SocketFile::bind(path)?;
        bound.set_nonblocking(true).context("cannot use the control socket")?;
        Self::run(Bound::Unix(bound, file), Service { router, connection_time_max })
    }

    /// The same at an address of this host.
    pub fn start_tcp(bound: BoundTcp, router: Router, connection_time_max: Duration) -> anyhow::Result<Self> {
        bound.set_nonblocking(true).context("cannot use the address")?;
        Self::run(Bound::Tcp(bound), Service { router, connection_time_max })
    }

    fn run(bound: Bound, service: Service) -> anyhow::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build().context("cannot start a runtime")?;
        let (stop, stopped) = oneshot::channel();
        let thread = thread::Builder::new().name("control".into()).spawn(move || {
            if let Err(error) = run(&runtime, bound, service, stopped) {
                log::error!("the control socket: {error}");
            }
            // Waits for what was begun on the runtime's other threads.
            drop(runtime);
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // What is being answered is cut off: jobs have threads of their own.
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("the control socket's thread panicked");
        }
    }
}

fn run(
    runtime: &Runtime,
    bound: Bound,
    service: Service,
    stopped: oneshot::Receiver<()>,
) -> std::io::Result<()> {
    runtime.block_on(async {
        let accepting = async {
            match bound {
                Bound::Unix(bound, _file) => {
                    let listener = UnixListener::from_std(bound)?;
                    accept(async || Ok(listener.accept().await?.0), &service).await;
                }
                Bound::Tcp(bound) => {
                    let listener = TcpListener::from_std(bound)?;
                    accept(async || Ok(listener.accept().await?.0), &service).await;
                }
            }
            Ok(())
        };
        tokio::select! {
            result = accepting => result,
            _ = stopped => Ok(()),
        }
    })
}

async fn accept<S>(next: impl AsyncFn() -> std::io::Result<S>, service: &Service)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    // Dropped, it ends what is left.
    let mut connections = JoinSet::new();
    loop {
        let place = Arc::clone(&places).acquire_owned().await.expect("it is never closed");
        while connections.try_join_next().is_some() {}
        match next().await {
            Ok(stream) => {
                let service = service.clone();
                connections.spawn(async move {
                    answer(stream, service).await;
                    drop(place);
                });
            }
            Err(error) => {
                log::error!("accepting at the control socket: {error}");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Answers one request.
async fn answer(stream: impl AsyncRead + AsyncWrite + Unpin, service: Service) {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .max_buf_size(HEAD_BYTES_MAX)
        .keep_alive(false);
    let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(service.router));
    match timeout(service.connection_time_max, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => log::debug!("the control socket: {error}"),
        Err(_) => log::debug!("the control socket: a peer took too long"),
    }
}
