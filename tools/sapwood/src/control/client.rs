//! The command line's end of a control socket.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use indicatif::ProgressBar;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use serde_json::value::RawValue;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use tokio::net::UnixStream;
use tokio::runtime::Builder;
use tokio::time::timeout;

use super::wire::{Failed, Failure, Job, Nothing, State};
use crate::cli::progress;
use crate::cli::serve::EXIT_INTERRUPTED;

/// Longest answer about a served disk, in bytes.
const ANSWER_BYTES_MAX: usize = 1 << 20;
/// Time for one answer about a served disk: the server itself gives up after 10 s.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(30);
/// Pauses between looks at a job: they grow from the first to the second.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));

/// SIGINT and SIGTERM: the first one is for the job, the second one ends this process.
struct Interrupts {
    asked: Arc<AtomicBool>,
    passed_on: bool,
}

impl Interrupts {
    fn take() -> std::io::Result<Self> {
        let asked = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM] {
            flag::register_conditional_shutdown(signal, EXIT_INTERRUPTED, Arc::clone(&asked))?;
            flag::register(signal, Arc::clone(&asked))?;
        }
        Ok(Self { asked, passed_on: false })
    }

    /// Whether the first one has come, once.
    fn is_first(&mut self) -> bool {
        let first = self.asked.load(Ordering::Relaxed) && !self.passed_on;
        self.passed_on |= first;
        first
    }
}

/// Begins a job and looks at it until it has ended, with a bar; what it answers. `look` is told the job's number,
/// and once, when SIGINT or SIGTERM came, that it is to be cancelled.
pub fn follow(
    begin: impl FnOnce() -> anyhow::Result<Job>,
    mut look: impl FnMut(u64, bool) -> anyhow::Result<Job>,
    bar: &ProgressBar,
) -> anyhow::Result<Arc<RawValue>> {
    let mut interrupts = Interrupts::take()?;
    let mut job = begin()?;
    let mut pause = PAUSES.0;
    while matches!(job.state, State::Waiting | State::Running) {
        progress::show(bar, job.done_bytes, job.total_bytes);
        sleep(pause);
        pause = (pause * 2).min(PAUSES.1);
        let is_cancelled = interrupts.is_first();
        job = match look(job.id, is_cancelled) {
            Err(error) if is_cancelled && Failure::of(&error).kind == "unsupported" => {
                eprintln!("sapwood: {error:#}");
                look(job.id, false)?
            }
            looked => looked?,
        };
    }
    bar.finish_and_clear();
    match (job.state, job.error) {
        (State::Done, _) => job.result.context("there is no result"),
        (State::Cancelled, _) => bail!("cancelled"),
        (_, Some(error)) => Err(error.into()),
        (_, None) => bail!("it failed"),
    }
}

/// A server that answers at a control socket.
pub struct Client<'a> {
    socket: &'a Path,
    answer_time_max: Duration,
    answer_bytes_max: usize,
}

impl<'a> Client<'a> {
    /// The server of a disk, whose socket this is.
    pub fn new(socket: &'a Path) -> Self {
        Self { socket, answer_time_max: ANSWER_TIME_MAX, answer_bytes_max: ANSWER_BYTES_MAX }
    }

    /// A server whose answers may take so long, and have so many bytes.
    pub fn patient(socket: &'a Path, answer_time_max: Duration, answer_bytes_max: usize) -> Self {
        Self { socket, answer_time_max, answer_bytes_max }
    }

    /// Facts about the disk.
    pub fn disk(&self) -> anyhow::Result<Value> {
        self.read(Method::GET, "/v1/disk", &Nothing {})
    }

    /// Has a job done, with a bar; what it answers. SIGINT and SIGTERM cancel it.
    pub fn run(&self, path: &str, body: &impl Serialize, bar: &ProgressBar) -> anyhow::Result<Value> {
        let result = follow(
            || self.read(Method::POST, path, body),
            |id, cancel| {
                let method = if cancel { Method::DELETE } else { Method::GET };
                self.read(method, &format!("/v1/jobs/{id}"), &Nothing {})
            },
            bar,
        )?;
        Ok(serde_json::from_str(result.get())?)
    }

    /// One request and its answer, as what it is.
    pub fn read<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> anyhow::Result<T> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let body = serde_json::to_vec(body)?;
        let answered = runtime.block_on(async {
            timeout(self.answer_time_max, self.exchange(method, path, body))
                .await
                .context("no answer in time")?
        });
        let (status, bytes) = answered.with_context(|| self.socket.display().to_string())?;
        if status.is_success() {
            return serde_json::from_slice(&bytes).with_context(|| self.odd());
        }
        let Failed { error } = serde_json::from_slice(&bytes).with_context(|| self.odd())?;
        Err(error.into())
    }

    fn odd(&self) -> String {
        format!("{}: what answers there is no control socket of sapwood", self.socket.display())
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> anyhow::Result<(StatusCode, Bytes)> {
        let stream = UnixStream::connect(self.socket).await.context("cannot connect")?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "sapwood")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), self.answer_bytes_max).collect().await;
        connection.abort();
        let body = body.map_err(|error| anyhow::anyhow!("{error}"))?;
        Ok((status, body.to_bytes()))
    }
}
