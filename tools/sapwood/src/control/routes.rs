//! From a request to an answer.

use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodRouter, delete, get, post};
use sapwood_image::{ErrorKind, ImageError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::Shared;
use super::disk::Served;
use super::jobs::{Job, Refused};
use super::wire::{Failed, Failure, JobList, Nothing, Rebase, Resize};
use crate::cli::info;

/// Longest body of a request in bytes.
const BODY_BYTES_MAX: usize = 64 << 10;

/// The OpenAPI document.
const DOCUMENT: &str = include_str!("../../../../docs/control-api.json");

/// An answer that is an error.
struct Error(StatusCode, Failure);

type Answer = Result<Response, Error>;
type Asked = State<Arc<Shared>>;
type Body = Result<Bytes, BytesRejection>;

impl Error {
    fn new(status: StatusCode, kind: &str, message: impl Into<String>) -> Self {
        Self(status, Failure { kind: kind.to_owned(), message: message.into() })
    }

    fn no_such_job() -> Self {
        Self::new(StatusCode::NOT_FOUND, "not-found", "there is no such job")
    }
}

impl From<ImageError> for Error {
    fn from(error: ImageError) -> Self {
        let status = match error.kind {
            ErrorKind::Unsupported(_) | ErrorKind::Invalid(_) => StatusCode::UNPROCESSABLE_ENTITY,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.kind.name(), error.to_string())
    }
}

impl From<Refused> for Error {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Busy(id) => Self::new(
                StatusCode::CONFLICT,
                "busy",
                format!("job {id} is under way: wait for it or cancel it first"),
            ),
            Refused::Stopping => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "stopping", "the server is stopping")
            }
            Refused::System(error) => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "system", format!("no thread: {error}"))
            }
        }
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        json_of(self.0, &Failed { error: self.1 })
    }
}

fn json_of(status: StatusCode, value: &impl Serialize) -> Response {
    let body = serde_json::to_vec(value).expect("plain data");
    (status, [(CONTENT_TYPE, "application/json")], body).into_response()
}

/// Reads a body; an empty one is an empty object.
fn parse<T: DeserializeOwned>(body: Body) -> Result<T, Error> {
    let invalid = |message| Error::new(StatusCode::BAD_REQUEST, "invalid", message);
    let body = body.map_err(|error| Error::new(error.status(), "invalid", error.body_text()))?;
    let body: &[u8] = if body.is_empty() { b"{}" } else { &body };
    serde_json::from_slice(body).map_err(|error| invalid(format!("the body: {error}")))
}

/// Everything that can be asked: method, path, handler.
fn routes() -> Vec<(&'static str, &'static str, MethodRouter<Arc<Shared>>)> {
    vec![
        ("get", "/v1", get(version)),
        ("get", "/v1/openapi.json", get(document)),
        ("get", "/v1/disk", get(show_disk)),
        ("post", "/v1/disk/resize", post(resize)),
        ("post", "/v1/disk/flatten", post(flatten)),
        ("post", "/v1/disk/rebase", post(rebase)),
        ("post", "/v1/disk/commit", post(commit)),
        ("get", "/v1/jobs", get(list_jobs)),
        ("get", "/v1/jobs/{id}", get(show_job)),
        ("delete", "/v1/jobs/{id}", delete(cancel_job)),
    ]
}

/// The service.
pub fn router(shared: Arc<Shared>) -> Router {
    let add = |router: Router<_>, (_, path, handler)| router.route(path, handler);
    routes()
        .into_iter()
        .fold(Router::new(), add)
        .fallback(async || Error::new(StatusCode::NOT_FOUND, "not-found", "there is no such path"))
        .method_not_allowed_fallback(async || {
            Error::new(StatusCode::METHOD_NOT_ALLOWED, "method", "this path does not have that method")
        })
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(shared)
}

async fn version() -> Response {
    json_of(StatusCode::OK, &json!({ "api": 1, "version": env!("CARGO_PKG_VERSION") }))
}

async fn document() -> Response {
    ([(CONTENT_TYPE, "application/json")], DOCUMENT).into_response()
}

async fn show_disk(State(shared): Asked) -> Answer {
    let mut value = info::json(&shared.served.info()?);
    value["read-only"] = shared.served.check_writable().is_err().into();
    value["frontend-connected"] = shared.served.server.is_connected().into();
    value["job"] = shared.jobs.running().into();
    Ok(json_of(StatusCode::OK, &value))
}

/// Starts a job for a disk that can have it done.
fn start(
    shared: &Shared,
    kind: &'static str,
    work: impl FnOnce(&Served, &Arc<Job>) -> anyhow::Result<Value> + Send + 'static,
) -> Answer {
    let served = shared.served.clone();
    let job = shared.jobs.start(kind, move |job| work(&served, job))?;
    Ok(json_of(StatusCode::ACCEPTED, &job))
}

async fn resize(State(shared): Asked, body: Body) -> Answer {
    let asked: Resize = parse(body)?;
    shared.served.check_writable()?;
    start(&shared, "resize", move |served, _| served.resize(&asked))
}

async fn flatten(State(shared): Asked, body: Body) -> Answer {
    let Nothing {} = parse(body)?;
    shared.served.layer()?;
    start(&shared, "flatten", Served::flatten)
}

async fn rebase(State(shared): Asked, body: Body) -> Answer {
    let asked: Rebase = parse(body)?;
    shared.served.layer()?;
    start(&shared, "rebase", move |served, job| served.rebase(asked, job))
}

async fn commit(State(shared): Asked, body: Body) -> Answer {
    let Nothing {} = parse(body)?;
    shared.served.layer()?;
    start(&shared, "commit", Served::commit)
}

async fn list_jobs(State(shared): Asked) -> Response {
    json_of(StatusCode::OK, &JobList { jobs: shared.jobs.list() })
}

async fn show_job(State(shared): Asked, Path(id): Path<String>) -> Answer {
    let job = id.parse().ok().and_then(|id| shared.jobs.get(id)).ok_or_else(Error::no_such_job)?;
    Ok(json_of(StatusCode::OK, &job))
}

async fn cancel_job(State(shared): Asked, Path(id): Path<String>) -> Answer {
    let job = id.parse().ok().and_then(|id| shared.jobs.cancel(id)).ok_or_else(Error::no_such_job)?;
    Ok(json_of(StatusCode::OK, &job))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn the_document_has_the_same_routes() {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        let documented = document["paths"].as_object().unwrap().iter().flat_map(|(path, item)| {
            item.as_object().unwrap().keys().map(move |method| (method.clone(), path.clone()))
        });
        let documented: BTreeSet<_> = documented.filter(|(method, _)| method != "parameters").collect();
        let served = routes().into_iter().map(|(method, path, _)| (method.to_owned(), path.to_owned()));
        assert_eq!(documented, served.collect());
    }
}
