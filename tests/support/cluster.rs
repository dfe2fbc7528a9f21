//! Cluster: a small API server of Kubernetes over HTTP: objects with versions, conflicts, merge patches, and trouble on
//! demand.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;

/// Serves until it is dropped.
pub struct Cluster {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
    _task: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct State {
    /// By path: `/api/v1/namespaces/NS/pods/NAME`.
    objects: BTreeMap<String, Value>,
    version: u64,
    asked: Vec<Asked>,
    /// Every answer is 500.
    fails: bool,
}

/// A request that was made.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: Method,
    pub path: String,
    pub body: Value,
}

impl Cluster {
    pub async fn start() -> Cluster {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let state = Arc::<Mutex<State>>::default();
        let task = AbortOnDropHandle::new(tokio::spawn(serve(listener, Arc::clone(&state))));
        Cluster { address, state, _task: task }
    }

    /// A kubeconfig for it, with a namespace.
    pub fn kubeconfig(&self, directory: &Path, namespace: &str) -> PathBuf {
        let file = directory.join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{{name: k, cluster: {{server: 'http://{}'}}}}]\n\
             users: [{{name: u, user: {{token: t}}}}]\n\
             contexts: [{{name: c, context: {{cluster: k, user: u, namespace: {namespace}}}}}]\n",
            self.address
        );
        std::fs::write(&file, text).expect("writable directory");
        file
    }

    /// Puts an object there as somebody else does.
    pub fn put(&self, path: &str, object: Value) {
        self.state().put(path, object);
    }

    pub fn remove(&self, path: &str) {
        self.state().objects.remove(path);
    }

    pub fn get(&self, path: &str) -> Option<Value> {
        self.state().objects.get(path).cloned()
    }

    pub fn fail(&self, fails: bool) {
        self.state().fails = fails;
    }

    /// Every request so far.
    pub fn asked(&self) -> Vec<Asked> {
        self.state().asked.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("not poisoned")
    }
}

impl State {
    fn put(&mut self, path: &str, mut object: Value) -> Value {
        self.version += 1;
        if !object["metadata"].is_object() {
            object["metadata"] = json!({});
        }
        object["metadata"]["resourceVersion"] = json!(self.version.to_string());
        self.objects.insert(path.to_owned(), object.clone());
        object
    }

    fn answer(&mut self, method: &Method, path: &str, body: &Value) -> (StatusCode, Value) {
        if self.fails {
            return status(StatusCode::INTERNAL_SERVER_ERROR, "InternalError");
        }
        let known = self.objects.get(path).cloned();
        match (method.as_str(), known) {
            ("GET", Some(object)) => (StatusCode::OK, object),
            ("GET", None) => {
                let prefix = format!("{path}/");
                let within = |name: &str| name.strip_prefix(&prefix).is_some_and(|rest| !rest.contains('/'));
                let items: Vec<&Value> =
                    self.objects.iter().filter(|(name, _)| within(name)).map(|(_, object)| object).collect();
                // The last part of a collection's path is a plural; of nothing there is no list.
                if !path.ends_with('s') {
                    return status(StatusCode::NOT_FOUND, "NotFound");
                }
                (
                    StatusCode::OK,
                    json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": self.version.to_string()}, "items": items}),
                )
            }
            ("POST", _) => {
                let path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap_or_default());
                match self.objects.contains_key(&path) {
                    true => status(StatusCode::CONFLICT, "AlreadyExists"),
                    false => (StatusCode::CREATED, self.put(&path, body.clone())),
                }
            }
            (_, None) => status(StatusCode::NOT_FOUND, "NotFound"),
            ("PUT", Some(old)) => {
                let version = &body["metadata"]["resourceVersion"];
                match version.is_null() || *version == old["metadata"]["resourceVersion"] {
                    true => (StatusCode::OK, self.put(path, body.clone())),
                    false => status(StatusCode::CONFLICT, "Conflict"),
                }
            }
            ("PATCH", Some(mut object)) => {
                merge(&mut object, body);
                (StatusCode::OK, self.put(path, object))
            }
            _ => status(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed"),
        }
    }
}

fn status(code: StatusCode, reason: &str) -> (StatusCode, Value) {
    let document = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": reason, "reason": reason,
        "code": code.as_u16(),
    });
    (code, document)
}

/// RFC 7396.
fn merge(object: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else { return *object = patch.clone() };
    if !object.is_object() {
        *object = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            object.as_object_mut().expect("an object").remove(key);
        } else {
            merge(&mut object[key], value);
        }
    }
}

async fn serve(listener: TcpListener, state: Arc<Mutex<State>>) {
    let mut connections = JoinSet::new();
    while let Ok((stream, _)) = listener.accept().await {
        let state = Arc::clone(&state);
        let service = service_fn(move |request| {
            let state = Arc::clone(&state);
            async move { Ok::<_, Infallible>(answer(request, &state).await) }
        });
        connections.spawn(hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

async fn answer(request: Request<Incoming>, state: &Mutex<State>) -> Response<Full<Bytes>> {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let path = head.uri.path().to_owned();
    let (status, document) = {
        let mut state = state.lock().expect("not poisoned");
        state.asked.push(Asked { method: head.method.clone(), path: path.clone(), body: body.clone() });
        state.answer(&head.method, &path, &body)
    };
    let mut response = Response::new(Full::new(Bytes::from(document.to_string())));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, "application/json".parse().expect("a value"));
    response
}
