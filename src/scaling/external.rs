//! External: the external metrics API of Kubernetes (`external.metrics.k8s.io/v1beta1`), for HPA.
//!
//! The API server passes to us what is asked under that group (an `APIService` names us), so that it is TLS, and the caller is
//! the API server, which shows a certificate. Every number is of all replicas of the proxy together.

mod answer;
mod callers;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use rustls_pki_types::CertificateDer;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, error, info};

use crate::config::{CertificateFiles, ExternalMetrics};
use crate::ids;
use crate::net::listen::{Accepted, Bounded, Socket};
use crate::net::tls::asking::{self, Authorities};
use crate::scaling::Source;
use crate::scaling::replicas::Replicas;
use answer::Asked;
use callers::{Callers, Known};

/// The API server has a few. So many of it, and so many again of whom it is not known that they are: nobody of these has a
/// place for longer than the next two say.
const CONNECTIONS_MAX: usize = 64;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Until the request of a caller whose certificate is none of ours, for which it is told so and the connection closed.
const STRANGER_TIMEOUT: Duration = Duration::from_secs(2);
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
const HEAD_BYTES_MAX: usize = 64 << 10;

/// Serves until it is dropped, with every connection, or told to `stop`: then it accepts nothing more.
pub async fn serve(replicas: Arc<Replicas>, socket: Socket, stop: CancellationToken) {
    let listener = match socket.into_tokio() {
        Ok(listener) => listener,
        Err(failure) => return error!(%failure, "kubernetes.external_metrics can't be served"),
    };
    let known = Arc::new(Known::new());
    let (sender, tls) = watch::channel(None);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let server = Arc::new(Server { replicas, known, tls, places });
    let _files = AbortOnDropHandle::new(tokio::spawn(Arc::clone(&server).follow_files(sender)));
    let listener = Bounded::new(listener, CONNECTIONS_MAX);
    let mut connections = JoinSet::new();
    while let Some((accepted, permit)) = listener.accept("the metrics API", &stop).await {
        while connections.try_join_next().is_some() {}
        // It is configured by IP and port.
        if let Accepted::Tcp(stream, _) = accepted {
            connections.spawn(Arc::clone(&server).connection(TcpStream::from_std(stream), permit));
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

struct Server {
    replicas: Arc<Replicas>,
    known: Arc<Known>,
    /// `None`: its files can't be used.
    tls: watch::Receiver<Option<Arc<ServerConfig>>>,
    /// Of callers who are known.
    places: Arc<Semaphore>,
}

impl Server {
    async fn connection(self: Arc<Self>, stream: std::io::Result<TcpStream>, permit: OwnedSemaphorePermit) {
        let Ok(stream) = stream else { return };
        let handshake = async {
            // Right after the start they may not have been read.
            let tls = self.tls.clone().wait_for(Option::is_some).await.ok().and_then(|tls| tls.clone());
            let tls = tls.ok_or_else(|| std::io::Error::other("there is no certificate"))?;
            TlsAcceptor::from(tls).accept(stream).await
        };
        let stream = match tokio::time::timeout(HANDSHAKE_TIMEOUT, handshake).await {
            Ok(Ok(stream)) => stream,
            Ok(Err(failure)) => return debug!(%failure, "a handshake with the metrics API failed"),
            Err(_) => return debug!("a handshake with the metrics API took too long"),
        };
        let chain = stream.get_ref().1.peer_certificates().unwrap_or_default();
        let chain: Arc<[CertificateDer<'static>]> = chain.iter().map(|one| one.clone().into_owned()).collect();
        let is_known = self.known.current().knows(&chain, ids::wall_clock());
        let (_place, timeout) = match is_known {
            // Where all of those are taken it keeps the one that it has.
            true => (Arc::clone(&self.places).try_acquire_owned().unwrap_or(permit), HEADER_TIMEOUT),
            false => (permit, STRANGER_TIMEOUT),
        };
        let service = service_fn(move |request| {
            let (server, chain) = (Arc::clone(&self), Arc::clone(&chain));
            async move { Ok::<_, Infallible>(server.answer(&request, &chain).await) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(timeout)
            .max_buf_size(HEAD_BYTES_MAX)
            .serve_connection(TokioIo::new(stream), service)
            .await;
        if let Err(failure) = served {
            debug!(%failure, "a connection to the metrics API broke off");
        }
    }

    async fn answer(&self, request: &Request<Incoming>, chain: &[CertificateDer<'_>]) -> Response<Full<Bytes>> {
        // At every request: the authorities may have changed since the connection began.
        let now = ids::wall_clock();
        if let Err(reason) = self.known.current().check(chain, request.headers(), now) {
            debug!(reason, "a caller of the metrics API was refused");
            self.known.was_refused();
            let mut answer = respond(StatusCode::UNAUTHORIZED, &answer::failure(StatusCode::UNAUTHORIZED, &reason));
            // Strangers must not hold the places of the API server.
            answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            return answer;
        }
        match Asked::of(request.method(), request.uri()) {
            Asked::Document(document) => respond(StatusCode::OK, &document),
            Asked::Wrong(status, message) => respond(status, &answer::failure(status, &message)),
            Asked::Values { metric, selector } => match self.replicas.sum(false).await {
                Ok(load) => respond(StatusCode::OK, &answer::value_list(&load, metric, &selector, now)),
                Err(failure) => {
                    let status = StatusCode::SERVICE_UNAVAILABLE;
                    respond(status, &answer::failure(status, &failure))
                }
            },
        }
    }

    /// Reads certificate and authority at the beginning and after every reload, which happens when one of these files
    /// changes, too. What can't be used changes nothing.
    async fn follow_files(self: Arc<Self>, tls: watch::Sender<Option<Arc<ServerConfig>>>) {
        let source = self.replicas.source().clone();
        let mut reloads = source.reload_state.subscribe();
        let mut seen = Seen::default();
        // Set where the cluster says who is known.
        let mut of_cluster = None;
        loop {
            let Some(settings) = settings(&source) else { return };
            let wanted = settings.clone();
            // They may be on a slow volume.
            let read = tokio::task::spawn_blocking(move || Read::of(&wanted)).await;
            match read {
                Ok(Ok(read)) => {
                    match read.authorities {
                        Some(authorities) => {
                            of_cluster = None;
                            if read.seen.authorities != seen.authorities {
                                self.known.set(Callers::Of(authorities));
                            }
                        }
                        None => {
                            of_cluster.get_or_insert_with(|| {
                                // Whom a file named that is no longer there is nobody any more.
                                self.known.set(callers::nobody_yet());
                                let following = callers::follow_cluster(source.clone(), Arc::clone(&self.known));
                                AbortOnDropHandle::new(tokio::spawn(following))
                            });
                        }
                    }
                    if read.seen.certificate != seen.certificate {
                        info!("the certificate of the metrics API is {}", settings.certificate.cert_file.display());
                        tls.send_replace(Some(read.tls));
                    }
                    seen = read.seen;
                }
                Ok(Err(failure)) => error!("kubernetes.external_metrics: {failure}; what was there stays in use"),
                Err(_) => {}
            }
            if reloads.changed().await.is_err() {
                return;
            }
        }
    }
}

fn settings(source: &Source) -> Option<ExternalMetrics> {
    source.running.snapshot.load().loaded.config.kubernetes.external_metrics.clone()
}

/// The contents of the files that are in use.
#[derive(Default, PartialEq)]
struct Seen {
    certificate: Option<(CertificateFiles, Vec<u8>, Vec<u8>)>,
    authorities: Option<(PathBuf, Vec<u8>)>,
}

/// What the files are good for.
struct Read {
    seen: Seen,
    tls: Arc<ServerConfig>,
    /// `None`: the cluster says whose certificates count.
    authorities: Option<Authorities>,
}

impl Read {
    fn of(settings: &ExternalMetrics) -> Result<Read, String> {
        let read = |path: &PathBuf| std::fs::read(path).map_err(|failure| format!("{}: {failure}", path.display()));
        let CertificateFiles { cert_file, key_file } = &settings.certificate;
        let certificate = Some((settings.certificate.clone(), read(cert_file)?, read(key_file)?));
        let tls = asking::asking_server(&settings.certificate)?;
        let (mut seen_authorities, mut authorities) = (None, None);
        if let Some(path) = &settings.client_ca_file {
            let pem = read(path)?;
            authorities = Some(Authorities::of_pem(&pem).map_err(|failure| format!("{}: {failure}", path.display()))?);
            seen_authorities = Some((path.clone(), pem));
        }
        Ok(Read { seen: Seen { certificate, authorities: seen_authorities }, tls, authorities })
    }
}

fn respond(status: StatusCode, document: &Value) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(format!("{document}\n"))));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache, private"));
    response
}
