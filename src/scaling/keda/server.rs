//! Server: gRPC by hand on tonic: which call a request is, and connections up to a bound.
//!
//! This is what tonic's code generator would write, for the four calls that there are.

use std::convert::Infallible;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tonic::body::Body;
use tonic::codegen::tokio_stream::Stream;
use tonic::codegen::{BoxFuture, BoxStream, Service, http};
use tonic::server::{Grpc, ServerStreamingService, UnaryService};
use tonic::transport::server::Connected;
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;
use tracing::{debug, error};

use crate::net::listen::{self, Accepted, Socket, TokioListener};
use crate::scaling::keda::Scaler;
use crate::scaling::keda::messages::{
    GET_METRIC_SPEC, GET_METRICS, GetMetricSpecResponse, GetMetricsRequest, GetMetricsResponse, IS_ACTIVE,
    IsActiveResponse, STREAM_IS_ACTIVE, ScaledObjectRef,
};
use crate::scaling::replicas::Replicas;

/// KEDA has one connection, or one a replica of its operator.
const CONNECTIONS_MAX: usize = 64;
/// One for each `ScaledObject`, and the calls beside them.
const STREAMS_MAX: u32 = 1024;
/// A request is a name or two and the metadata of a trigger.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// A peer that is gone without a word must not hold a place.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// Nor one that never said anything.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(10);

/// Serves until it is dropped, or told to `stop`. Then streams end, so that KEDA asks elsewhere.
pub async fn serve(replicas: Arc<Replicas>, socket: Socket, stop: CancellationToken) {
    let listener = match socket.into_tokio() {
        Ok(listener) => listener,
        Err(failure) => return error!(%failure, "kubernetes.keda can't be served"),
    };
    let permits = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let incoming = Incoming { listener, permits, acquiring: None, pause: None };
    let ended = stop.child_token();
    let scaler = Arc::new(Scaler::new(replicas, ended.clone()));
    // A task of its own, which says goodbye on every connection also where this one is dropped.
    let _ended = ended.clone().drop_guard();
    let serving = tokio::spawn(async move {
        tonic::transport::Server::builder()
            .max_concurrent_streams(STREAMS_MAX)
            .http2_keepalive_interval(Some(KEEPALIVE))
            .serve_with_incoming_shutdown(Calls(scaler), incoming, ended.cancelled())
            .await
    });
    if let Ok(Err(failure)) = serving.await {
        error!(%failure, "the server of kubernetes.keda has ended");
    }
}

/// Finds the call that a request is.
#[derive(Clone)]
struct Calls(Arc<Scaler>);

impl Service<http::Request<Body>> for Calls {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let scaler = Arc::clone(&self.0);
        Box::pin(async move {
            Ok(match request.uri().path() {
                IS_ACTIVE => grpc().unary(IsActive(scaler), request).await,
                GET_METRIC_SPEC => grpc().unary(GetMetricSpec(scaler), request).await,
                GET_METRICS => grpc().unary(GetMetrics(scaler), request).await,
                STREAM_IS_ACTIVE => grpc().server_streaming(StreamIsActive(scaler), request).await,
                other => Status::unimplemented(format!("there is no call {other} here")).into_http(),
            })
        })
    }
}

fn grpc<Answer, Question>() -> Grpc<ProstCodec<Answer, Question>>
where
    Answer: prost::Message + Default + 'static,
    Question: prost::Message + Default + 'static,
{
    Grpc::new(ProstCodec::default()).max_decoding_message_size(MESSAGE_BYTES_MAX)
}

struct IsActive(Arc<Scaler>);
struct StreamIsActive(Arc<Scaler>);
struct GetMetricSpec(Arc<Scaler>);
struct GetMetrics(Arc<Scaler>);

impl UnaryService<ScaledObjectRef> for IsActive {
    type Response = IsActiveResponse;
    type Future = BoxFuture<Response<IsActiveResponse>, Status>;

    fn call(&mut self, request: Request<ScaledObjectRef>) -> Self::Future {
        let scaler = Arc::clone(&self.0);
        Box::pin(async move { scaler.is_active(&request.into_inner()).await.map(Response::new) })
    }
}

impl ServerStreamingService<ScaledObjectRef> for StreamIsActive {
    type Response = IsActiveResponse;
    type ResponseStream = BoxStream<IsActiveResponse>;
    type Future = BoxFuture<Response<Self::ResponseStream>, Status>;

    fn call(&mut self, request: Request<ScaledObjectRef>) -> Self::Future {
        let scaler = Arc::clone(&self.0);
        Box::pin(async move { scaler.stream_is_active(&request.into_inner()).map(Response::new) })
    }
}

impl UnaryService<ScaledObjectRef> for GetMetricSpec {
    type Response = GetMetricSpecResponse;
    type Future = BoxFuture<Response<GetMetricSpecResponse>, Status>;

    fn call(&mut self, request: Request<ScaledObjectRef>) -> Self::Future {
        let answer = self.0.metric_spec(&request.into_inner()).map(Response::new);
        Box::pin(async move { answer })
    }
}

impl UnaryService<GetMetricsRequest> for GetMetrics {
    type Response = GetMetricsResponse;
    type Future = BoxFuture<Response<GetMetricsResponse>, Status>;

    fn call(&mut self, request: Request<GetMetricsRequest>) -> Self::Future {
        let scaler = Arc::clone(&self.0);
        Box::pin(async move { scaler.metrics(request.into_inner()).await.map(Response::new) })
    }
}

/// Accepts while there are places.
struct Incoming {
    listener: TokioListener,
    permits: Arc<Semaphore>,
    acquiring: Option<Acquiring>,
    /// Until when not to accept, because descriptors ran out.
    pause: Option<Pin<Box<tokio::time::Sleep>>>,
}

type Acquiring = Pin<Box<dyn Future<Output = Option<OwnedSemaphorePermit>> + Send>>;

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(context));
                self.pause = None;
            }
            if self.acquiring.is_none() {
                let permits = Arc::clone(&self.permits);
                self.acquiring = Some(Box::pin(async move { permits.acquire_owned().await.ok() }));
            }
            // Polled until it is ready, then kept until a connection has come: an accept that is dropped loses nothing.
            let this = &mut *self;
            let Some(acquiring) = &mut this.acquiring else { continue };
            let permit = ready!(acquiring.as_mut().poll(context));
            this.acquiring = None;
            let Some(permit) = permit else { return Poll::Ready(None) };
            match this.listener.poll_accept(context) {
                Poll::Pending => {
                    this.acquiring = Some(Box::pin(std::future::ready(Some(permit))));
                    return Poll::Pending;
                }
                Poll::Ready(Ok(Accepted::Tcp(stream, _))) => {
                    return Poll::Ready(Some(TcpStream::from_std(stream).map(|stream| Connection {
                        stream,
                        silent: Some(Box::pin(tokio::time::sleep(PREFACE_TIMEOUT))),
                        _permit: permit,
                    })));
                }
                // It is configured by IP and port.
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(failure)) if listen::is_resource_exhaustion(&failure) => {
                    this.pause = Some(Box::pin(tokio::time::sleep(listen::EXHAUSTED_PAUSE)));
                }
                Poll::Ready(Err(failure)) => debug!(%failure, "a connection of KEDA was lost before it was accepted"),
            }
        }
    }
}

/// A connection with its place.
struct Connection {
    stream: TcpStream,
    /// Until something has come: by then it has to.
    silent: Option<Pin<Box<tokio::time::Sleep>>>,
    _permit: OwnedSemaphorePermit,
}

impl Connected for Connection {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > before {
            self.silent = None;
        } else if read.is_pending()
            && let Some(silent) = &mut self.silent
        {
            ready!(silent.as_mut().poll(context));
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
