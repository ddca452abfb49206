//! The agent's own gRPC service: what an operator asks of this one server. It carries requests to the agent's
//! life ([`super::run`]) and answers back; it decides nothing.

use tokio::sync::{mpsc, oneshot};
use tonic::{Request, Response, Status};
use weft_proto::grpc::admin::admin_server::Admin;
use weft_proto::grpc::admin::{
    AddDriveReply, AddDriveRequest, AttachGuestReply, AttachGuestRequest, DetachGuestReply,
    DetachGuestRequest, InitReply, InitRequest, InspectReply, InspectRequest, JoinReply, JoinRequest,
};

/// A request with the place for its answer.
pub(crate) enum Order {
    Init(InitRequest, Answer<InitReply>),
    Join(JoinRequest, Answer<JoinReply>),
    AddDrive(AddDriveRequest, Answer<AddDriveReply>),
    AttachGuest(AttachGuestRequest, Answer<AttachGuestReply>),
    DetachGuest(DetachGuestRequest, Answer<DetachGuestReply>),
    Inspect(Answer<InspectReply>),
}

/// Where an answer goes.
pub(crate) type Answer<T> = oneshot::Sender<Result<T, Refused>>;

/// Why an order was not carried out, in terms of gRPC's codes.
#[derive(Debug)]
pub(crate) enum Refused {
    /// The operator asked for something that cannot be: names the thing, the value and the way out.
    Precondition(String),
    /// Others did not answer.
    Unavailable(String),
}

impl From<Refused> for Status {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Precondition(sentence) => Self::failed_precondition(sentence),
            Refused::Unavailable(sentence) => Self::unavailable(sentence),
        }
    }
}

/// The service; a mailbox to the agent's life.
#[derive(Clone)]
pub(crate) struct AdminService {
    orders: mpsc::Sender<Order>,
}

impl AdminService {
    /// The service and the end where its orders arrive.
    pub(crate) fn new() -> (Self, mpsc::Receiver<Order>) {
        let (orders, receiver) = mpsc::channel(16);
        (Self { orders }, receiver)
    }

    async fn order<T>(&self, order: impl FnOnce(Answer<T>) -> Order) -> Result<Response<T>, Status> {
        let (sender, receiver) = oneshot::channel();
        let ending = || Status::unavailable("the agent is ending");
        self.orders.send(order(sender)).await.map_err(|_| ending())?;
        Ok(Response::new(receiver.await.map_err(|_| ending())??))
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn init(&self, request: Request<InitRequest>) -> Result<Response<InitReply>, Status> {
        self.order(|answer| Order::Init(request.into_inner(), answer))
            .await
    }

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        self.order(|answer| Order::Join(request.into_inner(), answer))
            .await
    }

    async fn add_drive(&self, request: Request<AddDriveRequest>) -> Result<Response<AddDriveReply>, Status> {
        self.order(|answer| Order::AddDrive(request.into_inner(), answer))
            .await
    }

    async fn attach_guest(
        &self,
        request: Request<AttachGuestRequest>,
    ) -> Result<Response<AttachGuestReply>, Status> {
        self.order(|answer| Order::AttachGuest(request.into_inner(), answer))
            .await
    }

    async fn detach_guest(
        &self,
        request: Request<DetachGuestRequest>,
    ) -> Result<Response<DetachGuestReply>, Status> {
        self.order(|answer| Order::DetachGuest(request.into_inner(), answer))
            .await
    }

    async fn inspect(&self, _: Request<InspectRequest>) -> Result<Response<InspectReply>, Status> {
        self.order(Order::Inspect).await
    }
}
