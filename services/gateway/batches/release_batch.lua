-- Give up the lease of a batch, so that others need not wait for its expiry.
-- KEYS: lease
-- ARGV: gateway
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('UNLINK', KEYS[1]) end
