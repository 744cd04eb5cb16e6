-- What each order has reserved, so that it can be released.
create table reservations (
    order_id    text primary key,
    customer_id text not null references customers,
    amount      bigint not null check (amount > 0)
);
