//! What the routes of all control sockets have in common: errors, bodies, jobs.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get};
use sapwood_image::ImageError;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::jobs::{Jobs, Refused};
use super::wire::{Failed, Failure, JobList};

/// Longest body of a request in bytes.
const BODY_BYTES_MAX: usize = 64 << 10;

/// An answer that is an error.
pub struct Error(StatusCode, Failure);

/// What a handler answers.
pub type Answer = Result<Response, Error>;
/// The body of a request.
pub type Body = Result<Bytes, BytesRejection>;
/// A method, a path and who answers.
pub type Route<S> = (&'static str, &'static str, MethodRouter<Arc<S>>);

/// What has jobs.
pub trait HasJobs: Send + Sync + 'static {
    /// Its jobs.
    fn jobs(&self) -> &Jobs;
}

impl Error {
    fn new(status: StatusCode, kind: &str, message: impl Into<String>) -> Self {
        Self(status, Failure::new(kind, message))
    }

    /// A request that is not understood.
    pub fn not_understood(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid", message)
    }

    fn no_such_job() -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", "there is no such job")
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        let status = match failure.kind.as_str() {
            "not-found" => StatusCode::NOT_FOUND,
            "unsupported" | "invalid" | "no-daemon" => StatusCode::UNPROCESSABLE_ENTITY,
            "exists" | "in-use" | "unsaved" | "protected" | "has-snapshots" | "locked" | "busy"
            | "unfinished" => StatusCode::CONFLICT,
            "stopping" => StatusCode::SERVICE_UNAVAILABLE,
            "full" => StatusCode::INSUFFICIENT_STORAGE,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self(status, failure)
    }
}

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Self {
        Failure::from(error).into()
    }
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Busy(id) => {
                Self::new("busy", format!("job {id} is under way: wait for it or cancel it first"))
            }
            Refused::Uncancellable(id) => Self::new(
                "unsupported",
                format!("job {id} is not cut off between its steps: it ends by itself, soon"),
            ),
            Refused::Stopping => Self::new("stopping", "the server is stopping"),
            Refused::System(error) => Self::new("system", format!("no thread: {error}")),
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        json_of(self.0, &Failed { error: self.1 })
    }
}

/// An answer in JSON.
pub fn json_of(status: StatusCode, value: &impl Serialize) -> Response {
    let body = serde_json::to_vec(value).expect("plain data");
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}

/// An answer that is JSON already.
pub fn json_text(text: &'static str) -> Response {
    ([(CONTENT_TYPE, "application/json")], text).into_response()
}

/// Reads a body; an empty one is an empty object.
pub fn parse<T: DeserializeOwned>(body: Body) -> Result<T, Error> {
    let body = body.map_err(|error| Error::new(error.status(), "invalid", error.body_text()))?;
    let body: &[u8] = if body.is_empty() { b"{}" } else { &body };
    serde_json::from_slice(body).map_err(|error| Error::not_understood(format!("the body: {error}")))
}

/// The routes of jobs.
pub fn job_routes<S: HasJobs>() -> Vec<Route<S>> {
    vec![
        ("get", "/v1/jobs", get(list_jobs::<S>)),
        ("get", "/v1/jobs/{id}", get(show_job::<S>)),
        ("delete", "/v1/jobs/{id}", delete(cancel_job::<S>)),
    ]
}

/// A router of routes, with bounds and answers for all else.
pub fn router<S: Send + Sync + 'static>(routes: Vec<Route<S>>, state: Arc<S>) -> Router {
    let add = |router: Router<_>, (_, path, handler)| router.route(path, handler);
    routes
        .into_iter()
        .fold(Router::new(), add)
        .fallback(async || Error::new(StatusCode::NOT_FOUND, "not-found", "there is no such path"))
        .method_not_allowed_fallback(async || {
            Error::new(StatusCode::METHOD_NOT_ALLOWED, "method", "this path does not have that method")
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(state)
}

async fn list_jobs<S: HasJobs>(State(state): State<Arc<S>>) -> Response {
    json_of(StatusCode::OK, &JobList { jobs: state.jobs().list() })
}

/// The number of a job, as a path says it.
type Number = Result<Path<u64>, PathRejection>;

async fn show_job<S: HasJobs>(State(state): State<Arc<S>>, id: Number) -> Answer {
    let job = id.ok().and_then(|Path(id)| state.jobs().get(id)).ok_or_else(Error::no_such_job)?;
    Ok(json_of(StatusCode::OK, &job))
}

async fn cancel_job<S: HasJobs>(State(state): State<Arc<S>>, id: Number) -> Answer {
    let job = id.ok().and_then(|Path(id)| state.jobs().cancel(id)).ok_or_else(Error::no_such_job)?;
    let job = job.map_err(Failure::from)?;
    Ok(json_of(StatusCode::OK, &job))
}

/// The routes that an OpenAPI document lists: methods and paths.
#[cfg(test)]
pub fn documented(document: &serde_json::Value) -> std::collections::BTreeSet<(String, String)> {
    let paths = document["paths"].as_object().expect("paths").iter();
    let all = paths.flat_map(|(path, item)| {
        let methods = item.as_object().expect("an item").keys();
        methods.map(move |method| (method.clone(), path.clone()))
    });
    all.filter(|(method, _)| method != "parameters").collect()
}
