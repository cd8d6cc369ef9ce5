//! From a request about a store to an operation, and from its answer to a response.
//!
//! Operations block: each runs on a thread of the runtime's own pool, and goes on to its end when whoever asked
//! goes away.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest, Path, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use axum::routing::{delete, get, post};
use serde_json::{Map, Value, json};
use tokio::time::timeout;

use super::operation::{Long, Method, Operation, Quick, read};
use super::service::{Service, system};
use super::{change, limit, live, look, transfer, upkeep};
use crate::control::http::{self, Answer, Body, Error, Route, json_of, json_text, parse};
use crate::control::wire::Failure;
use crate::metrics::listen::answer as answer_page;

/// The OpenAPI document.
const DOCUMENT: &str = include_str!("../../../../docs/daemon-api.json");

/// Time for the body of a request.
const BODY_TIME_MAX: Duration = Duration::from_secs(10);

type Asked = State<Arc<Service>>;
type Parameters = Result<Path<BTreeMap<String, String>>, PathRejection>;

/// Everything that can be asked.
fn routes() -> Vec<Route<Service>> {
    let mut routes = vec![
        ("get", "/v1", get(version)),
        ("get", "/v1/openapi.json", get(document)),
        quick::<look::ShowStore>(),
        quick::<change::SetSpace>(),
        long::<upkeep::SealAll>(),
        long::<upkeep::Collect>(),
        long::<upkeep::CheckStore>(),
        long::<upkeep::ScrubStore>(),
        long::<upkeep::Account>(),
        long::<upkeep::BackUp>(),
        long::<transfer::Import>(),
        quick::<limit::ShowLimits>(),
        quick::<limit::LimitVolume>(),
        quick::<limit::LimitGroup>(),
        quick::<limit::DeleteGroup>(),
        quick::<look::ListEvents>(),
        quick::<look::ShowStatistics>(),
        ("get", "/metrics", get(metrics)),
        quick::<look::ShowTree>(),
        quick::<look::ListVolumes>(),
        quick::<change::CreateVolume>(),
        quick::<look::ShowVolume>(),
        quick::<change::DeleteVolume>(),
        quick::<change::RenameVolume>(),
        quick::<change::NoteVolume>(),
        quick::<change::Switch>(),
        quick::<change::Rollback>(),
        quick::<live::AttachVolume>(),
        quick::<live::DetachVolume>(),
        quick::<live::ReadVolume>(),
        long::<live::ResizeVolume>(),
        quick::<look::ListSnapshots>(),
        quick::<live::TakeSnapshot>(),
        quick::<look::ShowSnapshot>(),
        quick::<change::DeleteSnapshot>(),
        quick::<change::RenameSnapshot>(),
        quick::<change::NoteSnapshot>(),
        quick::<change::CloneSnapshot>(),
        quick::<live::AttachSnapshot>(),
        quick::<live::DetachSnapshot>(),
        long::<upkeep::SealSnapshot>(),
        long::<transfer::Export>(),
        long::<transfer::DiffSnapshot>(),
    ];
    routes.extend(http::job_routes());
    routes
}

/// The service.
pub fn router(service: Arc<Service>) -> Router {
    http::router(routes(), service)
}

/// What is answered by a process that serves one volume and has the store to itself: numbers alone.
pub fn numbers(service: Arc<Service>) -> Router {
    let routes = vec![
        ("get", "/v1", get(version)),
        quick::<look::ShowStatistics>(),
        ("get", "/metrics", get(metrics)),
    ];
    http::router(routes, service)
}

fn quick<O: Quick>() -> Route<Service> {
    let handler = match O::METHOD {
        Method::Get => get(answer::<O>),
        Method::Post => post(answer::<O>),
        Method::Delete => delete(answer::<O>),
    };
    (O::METHOD.name(), O::PATH, handler)
}

fn long<O: Long>() -> Route<Service> {
    let handler = match O::METHOD {
        Method::Get => get(begin::<O>),
        Method::Post => post(begin::<O>),
        Method::Delete => delete(begin::<O>),
    };
    (O::METHOD.name(), O::PATH, handler)
}

async fn operation<O: Operation>(parameters: Parameters, request: Request) -> Result<O, Error> {
    let Path(parameters) = parameters.map_err(|error| Error::not_understood(error.body_text()))?;
    let body: Body = timeout(BODY_TIME_MAX, Bytes::from_request(request, &()))
        .await
        .map_err(|_| Error::not_understood("the body does not come"))?;
    let body: Map<String, Value> = parse(body)?;
    read(parameters, body).map_err(|error| Error::not_understood(format!("the request: {error}")))
}

async fn answer<O: Quick>(State(service): Asked, parameters: Parameters, request: Request) -> Answer {
    let operation = operation::<O>(parameters, request).await?;
    let answered = tokio::task::spawn_blocking(move || operation.run(&service)).await.map_err(system)?;
    Ok(json_of(StatusCode::OK, &answered?))
}

async fn begin<O: Long>(State(service): Asked, parameters: Parameters, request: Request) -> Answer {
    let operation = operation::<O>(parameters, request).await?;
    let job = service.start(operation).map_err(Failure::from)?;
    Ok(json_of(StatusCode::ACCEPTED, &job))
}

async fn version(State(service): Asked) -> Response {
    let store = service.store().id();
    json_of(StatusCode::OK, &json!({ "api": 1, "version": env!("CARGO_PKG_VERSION"), "store": store }))
}

async fn document() -> Response {
    json_text(DOCUMENT)
}

async fn metrics(State(service): Asked, headers: HeaderMap) -> Answer {
    answer_page(Arc::new(move || look::page(&service)), headers).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_document_has_the_same_routes() {
        let document: Value = serde_json::from_str(DOCUMENT).unwrap();
        let served = routes().into_iter().map(|(method, path, _)| (method.to_owned(), path.to_owned()));
        assert_eq!(http::documented(&document), served.collect());
    }
}
