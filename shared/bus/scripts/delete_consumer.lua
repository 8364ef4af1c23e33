-- Delete the consumer if it owns no entries. A delivery to a replica that leaves in order does not count as an attempt.
-- KEYS: stream
-- ARGV: consumer group, consumer, most pending entries
local pending = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', ARGV[3], ARGV[2])
if pending.err then return end
for _, entry in ipairs(pending) do
  redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, entry[1], 'RETRYCOUNT', math.max(entry[4] - 1, 0), 'JUSTID')
end
if #pending == 0 then redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2]) end
