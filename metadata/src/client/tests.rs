use tokio::net::TcpListener;

use super::*;

/// What only a defect reaches.
const PATIENCE: Duration = Duration::from_secs(60);

/// A member that takes connections and never says anything.
async fn silent() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    (listener, address)
}

#[tokio::test]
async fn a_request_does_not_wait_for_a_silent_leader_once_another_one_is_known() {
    let (former, former_address) = silent().await;
    let (next, next_address) = silent().await;
    let mut client = MetadataClient::new([former_address.clone()]).with_deadline(10 * PATIENCE);
    client.attempt = 10 * PATIENCE;
    client.leads(&former_address);
    let asking = client.clone();
    let asking = tokio::spawn(async move { asking.status().await });
    let (_held, _) = tokio::time::timeout(PATIENCE, former.accept())
        .await
        .expect("the leader is asked")
        .unwrap();
    client.leads(&next_address);
    tokio::time::timeout(PATIENCE, next.accept())
        .await
        .expect("the next leader is asked while the former one is silent")
        .unwrap();
    asking.abort();
}
