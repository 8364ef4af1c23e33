-- Renew the lease of a batch.
-- KEYS: batch, its lease
-- ARGV: gateway, ms
-- Returns the status of the batch; false if the lease is another's.
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return false end
redis.call('PEXPIRE', KEYS[2], ARGV[2])
return redis.call('HGET', KEYS[1], 'status')
